"""The walk from block to block: each is observed, its layers are solved and written, and the streams move on."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float, Int64
from torch import Tensor

from dashq.calibration.layers import Observation
from dashq.calibration.outside import observe_outside
from dashq.calibration.passes import BlockPasses
from dashq.calibration.paused import passes_pause
from dashq.calibration.sequential import OriginalBlock, Stages, corrected_target, probe_of, sequential_stages
from dashq.calibration.shares import Shares
from dashq.calibration.shell import Shell
from dashq.calibration.stream import Stream
from dashq.calibration.strips import solvers_of
from dashq.calibration.tokens import Drawn
from dashq.model.decoder import OUTSIDE, Block, Model
from dashq.processes.group import here
from dashq.quantizing.layer import LayerWork, Preparations
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Recipe
from dashq.results.clock import Clock
from dashq.results.events import LayerDone, Listener
from dashq.results.parts import Parts, packed_by, report_by
from dashq.results.report import LayerReport
from dashq.solving.certificate import certify

_Replace = Callable[[str, Float[Tensor, "rows columns"]], None]  # puts a solved layer's weight in its place
_Solved = tuple[Mapping[str, Tensor], LayerReport]  # a layer's packed tensors, and its report

OUTSIDE_LAYERS = "embeddings and head"  # the part of a result that is made behind the blocks


@dataclass(frozen=True, eq=False)
class Walk:
    """All that goes along from block to block.

    No tensor of a block may be kept here: it, and the files that parts of it are views of, would stay in memory beside
    the next one.
    """

    recipe: Recipe
    plans: Sequence[LayerPlan]
    parts: Parts
    stream: Stream
    original: Stream | None  # the original model's, where layers are corrected
    probe: Stream | None  # a few tokens that tell the order of layers, where it counts
    pauses: bool  # a block's passes pause before each stage
    listen: Listener

    @classmethod
    def begin(
        cls,
        recipe: Recipe,
        model: Model,
        drawn: Drawn,
        plans: Sequence[LayerPlan],
        parts: Parts,
        listen: Listener = lambda event: None,
    ) -> "Walk":
        """The walk before the first block, with this process's share of the samples.

        Raises a `ProcessesError` where there are more processes than shares.
        """
        text, shares = recipe.calibration, Shares.of(plans, recipe.calibration)
        shares.check(here().count)
        stream = Stream(model, drawn.samples, shares=shares)
        probe = probe_of(model, drawn.samples) if text.propagate == "sequential" else None
        original = stream.twin() if text.corrects else None
        pauses = all(here().of_all(passes_pause(model, plans, text)))
        return cls(recipe, plans, parts, stream, original, probe, pauses, listen)

    @property
    def clock(self) -> Clock:
        """The run's clock."""
        return self.parts.clock

    def go_through(self, block: Block) -> None:
        """Quantize the block, unless an interrupted run has; in the end it is the result's."""
        if block.name in self.parts.finished:
            self.pass_finished(block)
        else:
            self.quantize(block)

    def quantize(self, block: Block) -> None:
        """Observe, quantize and write the block's layers, and move the streams on; the block is the result's then."""
        plans = self._plans_by_block[block.name]
        tensors = block.tensors_without([plan.layer.name for plan in plans])
        reports = []
        with self.clock.measuring("calibrate"):
            stages = sequential_stages(block, plans, self.probe) if self.probe else Stages((), plans)
            original = OriginalBlock.of(self.original, block) if self.original else None
            one_pass = self.recipe.calibration.propagate == "original"
            passes = BlockPasses(block, stages, self.stream, original, one_pass, self.pauses)
        with closing(passes):
            for stage in stages:
                with self.clock.measuring("calibrate"):
                    observations = passes.observe(stage)
                for packed, report in self._solve_all(stage, block.weight, observations, block.replace_weight):
                    tensors |= {f"{report.name}.{key}": tensor for key, tensor in packed.items()}
                    reports.append(report)
            with self.clock.measuring("calibrate"):
                passes.finish()
        with self.clock.measuring("write"):
            self.parts.add(block.name, tensors, reports)

    def quantize_outside(self, model: Model, tokens: Int64[Tensor, "samples tokens"]) -> None:
        """Quantize and write embeddings and head, where planned, when the streams have passed all blocks."""
        plans = self._plans_by_block.get(OUTSIDE, ())
        if not plans or OUTSIDE_LAYERS in self.parts.finished:
            return
        tensors: dict[str, Tensor] = {}
        reports = []
        with model.outside(head=True) as outside:
            with self.clock.measuring("calibrate"):
                observations = observe_outside(model, Shell(model), plans, tokens, self.stream, self.original)
            for packed, report in self._solve_all(plans, lambda name: outside[f"{name}.weight"], observations):
                tensors |= {f"{report.name}.{key}": tensor for key, tensor in packed.items()}
                reports.append(report)
        with self.clock.measuring("write"):
            self.parts.add(OUTSIDE_LAYERS, tensors, reports)

    def pass_finished(self, block: Block) -> None:
        """Move the streams on behind a block that an interrupted run has finished; the block is the result's then."""
        with self.clock.measuring("calibrate"):
            if self.original:
                self.original.advance(block)
            if self.recipe.calibration.propagate == "original":
                self.stream.advance(block)
            self._restore(block)
            if self.recipe.calibration.propagate != "original":
                self.stream.advance(block)

    @cached_property
    def _plans_by_block(self) -> Mapping[str, Sequence[LayerPlan]]:
        plans: dict[str, list[LayerPlan]] = defaultdict(list)
        for plan in self.plans:
            plans[plan.layer.block].append(plan)
        return plans

    def _solve_all(
        self,
        plans: Sequence[LayerPlan],
        weight_of: Callable[[str], Float[Tensor, "rows columns"]],
        observations: dict[str, Observation],
        replace_weight: _Replace | None = None,
    ) -> list[_Solved]:
        """The tensors and the report of each layer: those with observations are solved here, others elsewhere.

        A layer whose strips several processes solve is finished by the one that has the first of them.
        """
        solved: dict[str, _Solved] = {}
        device, spread, rank = self.stream.device, self.stream.is_spread, here().rank
        solvers = solvers_of(plans, here().count)
        unfinished: dict[str, LayerWork] = {}
        preparations = Preparations()
        for plan in plans:
            if (name := plan.layer.name) in observations:
                own = [number for number, solver in enumerate(solvers[name]) if not spread or solver == rank]
                weight = weight_of(name).to(device).float()
                work = self._solve(plan, weight, observations.pop(name), own, preparations)
                if work.is_whole:
                    solved[name] = self._finish(work, replace_weight)
                else:
                    unfinished[name] = work
        if spread:
            with self.clock.measuring("exchange"):
                self._hand_over(solvers, unfinished)
            for name, work in unfinished.items():
                if solvers[name][0] == rank:
                    solved[name] = self._finish(work, replace_weight)
            with self.clock.measuring("exchange"):
                solved = self._exchanged(plans, solvers, solved, replace_weight)
        return [solved[plan.layer.name] for plan in plans]

    def _hand_over(self, solvers: Mapping[str, Sequence[int]], unfinished: Mapping[str, LayerWork]) -> None:
        """Let each layer's strips come to the process that has the first of them."""
        for name, (first, *others) in solvers.items():
            for number, solver in enumerate(others, start=1):
                if solver == first:
                    continue
                if solver == here().rank:
                    here().send(unfinished[name].solved(number), first)
                elif first == here().rank:
                    like = unfinished[name].solved(0)
                    unfinished[name].take(number, here().receive(like, solver, self.stream.device))

    def _exchanged(
        self,
        plans: Sequence[LayerPlan],
        solvers: Mapping[str, Sequence[int]],
        own: Mapping[str, _Solved],
        replace_weight: _Replace | None,
    ) -> dict[str, _Solved]:
        """The tensors and reports of all layers, each from the process that has finished it."""
        solved, serializer = {}, self.recipe.serializer
        for plan in plans:
            name = plan.layer.name
            packed, report = own.get(name, ({}, None))
            packed = packed_by(solvers[name][0], packed, plan.stored, serializer)
            report = report_by(solvers[name][0], report)
            if name not in own:
                if replace_weight:
                    quantized = serializer.unpack(packed, plan.layer.columns, plan.size, plan.grid)
                    replace_weight(name, quantized.dequantize())
                self.listen(LayerDone(report))
            solved[name] = packed, report
        return solved

    def _solve(
        self,
        plan: LayerPlan,
        original: Float[Tensor, "rows columns"],
        observation: Observation,
        numbers: Sequence[int],
        preparations: Preparations,
    ) -> LayerWork:
        """Strips of one layer, which aims at the weights that its inputs call for."""
        with self.clock.measuring("solve"):
            weight = corrected_target(original, observation, self.recipe.calibration.error_correction)
            work = LayerWork(plan, weight, observation, preparations)
            work.solve(numbers)
        return work

    def _finish(self, work: LayerWork, replace_weight: _Replace | None) -> _Solved:
        """The packed tensors of a layer whose strips are all solved, and its report."""
        plan, name = work.plan, work.plan.layer.name
        with self.clock.measuring("solve"):
            quantized, report = work.finished()
        groups = -(-self.recipe.certificate_groups // len(self.plans))
        if groups and plan.scheme.solver.objective == "groups":
            with self.clock.measuring("certify"):
                certificate = certify(name, work.weight, quantized, work.observation.curvature, groups)
            report = replace(report, certificate=certificate)
        self.listen(LayerDone(report))
        if replace_weight:
            replace_weight(name, quantized.dequantize())
        return self.recipe.serializer.pack(quantized), report

    def _restore(self, block: Block) -> None:
        """Put back the quantized weights that an interrupted run has left on disk."""
        for plan in self._plans_by_block[block.name]:
            packed = self.parts.read(block.name, plan.stored, self.recipe.serializer)
            quantized = self.recipe.serializer.unpack(packed, plan.layer.columns, plan.size, plan.grid)
            block.replace_weight(plan.layer.name, quantized.dequantize())
