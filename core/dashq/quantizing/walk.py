"""The walk from block to block: each is observed, its layers are solved and written, and the streams move on."""

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property

from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from dashq.calibration.layers import Observation
from dashq.calibration.observe import BlockWatcher, watch_block
from dashq.calibration.outside import HeadWatcher
from dashq.calibration.passes import BlockPasses
from dashq.calibration.paused import passes_pause
from dashq.calibration.sequential import OriginalBlock, Stages, corrected_target, probe_of, sequential_stages
from dashq.calibration.shares import Shares
from dashq.calibration.shell import Shell
from dashq.calibration.stream import Stream
from dashq.calibration.strips import solved_together, solvers_of
from dashq.calibration.tokens import Drawn
from dashq.model.decoder import OUTSIDE, Block, Model
from dashq.processes.group import here
from dashq.quantizing.kept import HEAD, Kept
from dashq.quantizing.layer import LayerWork, Preparations, solve_together
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
    stream: Stream | None  # of the samples; none where what calibration learned is taken from disk
    original: Stream | None  # the original model's, where layers are corrected
    probe: Stream | None  # a few tokens that tell the order of layers, where it counts
    pauses: bool  # a block's passes pause before each stage
    kept: Kept | None  # where what calibration learns is kept, or taken from
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
        kept: Kept | None = None,
    ) -> "Walk":
        """The walk before the first block, with this process's share of the samples, unless their sums are taken.

        Raises a `ProcessesError` where there are more processes than shares.
        """
        text, shares = recipe.calibration, Shares.of(plans, recipe.calibration)
        shares.check(here().count)
        if kept and kept.taken:
            return cls(recipe, plans, parts, None, None, None, False, kept, listen)
        stream = Stream(model, drawn.samples, shares=shares)
        probe = probe_of(model, drawn.samples) if text.propagate == "sequential" else None
        original = stream.twin() if text.corrects else None
        pauses = all(here().of_all(passes_pause(model, plans, text)))
        return cls(recipe, plans, parts, stream, original, probe, pauses, kept, listen)

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
        with closing(self._observed(block, plans)) as stages:
            for stage, observations, shared in stages:
                solved = self._solve_all(stage, block.weight, observations, block.replace_weight, shared)
                for packed, report in solved:
                    tensors |= {f"{report.name}.{key}": tensor for key, tensor in packed.items()}
                    reports.append(report)
        with self.clock.measuring("write"):
            self.parts.add(block.name, tensors, reports)

    def quantize_outside(self, model: Model, tokens: Int64[Tensor, "samples tokens"]) -> None:
        """Quantize and write embeddings and head, where planned, when the streams have passed all blocks."""
        plans = self._plans_by_block.get(OUTSIDE, ())
        if not plans:
            return
        if OUTSIDE_LAYERS in self.parts.finished:
            if self.kept and HEAD in self.kept.files.keys() - self.kept.found:
                with model.outside(head=True):
                    self._learned_of_head(model, plans)
            return
        tensors: dict[str, Tensor] = {}
        reports = []
        with model.outside(head=True) as outside:
            observations = self._learned_of_head(model, plans).observations(tokens)
            for packed, report in self._solve_all(plans, lambda name: outside[f"{name}.weight"], observations):
                tensors |= {f"{report.name}.{key}": tensor for key, tensor in packed.items()}
                reports.append(report)
        with self.clock.measuring("write"):
            self.parts.add(OUTSIDE_LAYERS, tensors, reports)

    def pass_finished(self, block: Block) -> None:
        """Move the streams on behind a block that an interrupted run has finished; the block is the result's then."""
        if self.stream is None:
            self._restore(block)
        elif self.kept and block.name not in self.kept.found:  # it was not kept before the interruption
            self._learned(block)
            self._restore(block)
        else:
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

    def _observed(
        self, block: Block, plans: Sequence[LayerPlan]
    ) -> Generator[tuple[Sequence[LayerPlan], dict[str, Observation], bool]]:
        """The block's layers in the stages in which they are solved, with their observations; the streams move on.

        True is for a stage of layers that share their inputs.
        """
        if self.stream is None or self.kept:
            watcher = self._learned(block)
            if plans:
                with self.clock.measuring("take" if self.stream is None else "calibrate"):
                    observations = watcher.observations()
                del watcher  # its sums are as large as the curvatures
                yield plans, observations, False
            return
        with self.clock.measuring("calibrate"):
            stages = sequential_stages(block, plans, self.probe) if self.probe else Stages((), plans)
            original = OriginalBlock.of(self.original, block) if self.original else None
            one_pass = self.recipe.calibration.propagate == "original"
            passes = BlockPasses(block, stages, self.stream, original, one_pass, self.pauses)
        with closing(passes):
            for stage in stages:
                with self.clock.measuring("calibrate"):
                    observations = passes.observe(stage)
                yield stage, observations, stage is not stages.rest
            with self.clock.measuring("calibrate"):
                passes.finish()

    def _learned(self, block: Block) -> BlockWatcher:
        """A watcher with all that calibration learns of a block's layers, which is kept, or read from disk."""
        plans = self._plans_by_block[block.name]
        if self.stream is None:
            watcher = BlockWatcher(block, plans, shares=1, is_spread=here().count > 1)
            self._take(block.name, watcher)
        else:
            with self.clock.measuring("calibrate"):
                watcher = watch_block(block, plans, self.stream, one_pass=True)
            self._keep(block.name, watcher)
        return watcher

    def _learned_of_head(self, model: Model, plans: Sequence[LayerPlan]) -> HeadWatcher:
        """The same of the head, whose weights are there."""
        watcher = HeadWatcher(plans, model.device, is_spread=here().count > 1)
        if self.stream is None:
            self._take(HEAD, watcher)
        else:
            with self.clock.measuring("calibrate"):
                watcher.watch(model, Shell(model), self.stream, self.original)
            self._keep(HEAD, watcher)
        return watcher

    def _take(self, part: str, watcher: BlockWatcher | HeadWatcher) -> None:
        """Let a watcher know what an earlier run has learned of a part of the model."""
        if self.kept and part in self.kept.parts:
            with self.clock.measuring("take"):
                watcher.take(self.kept.read(part, self.clock.device))

    def _keep(self, part: str, watcher: BlockWatcher | HeadWatcher) -> None:
        """Let all processes know what they need of a part of the model, and keep it where it is not on disk yet."""
        is_new = self.kept is not None and part in self.kept.parts and part not in self.kept.found
        with self.clock.measuring("calibrate"):
            watcher.collect(also=[0] if is_new else [])
        if self.kept and is_new and here().is_first:
            with self.clock.measuring("keep"):
                self.kept.add(part, watcher.sums())

    def _solve_all(
        self,
        plans: Sequence[LayerPlan],
        weight_of: Callable[[str], Float[Tensor, "rows columns"]],
        observations: dict[str, Observation],
        replace_weight: _Replace | None = None,
        shared: bool = False,
    ) -> list[_Solved]:
        """The tensors and the report of each layer: those with observations are solved here, others elsewhere.

        A layer whose strips several processes solve is finished by the one that has the first of them. Small layers
        that have `shared` inputs are solved together.
        """
        solved: dict[str, _Solved] = {}
        device, spread, rank = self.clock.device, here().count > 1, here().rank
        solvers = solvers_of(plans, here().count, shared)
        unfinished: dict[str, LayerWork] = {}
        preparations = Preparations()
        for some in solved_together(plans) if shared else [[plan] for plan in plans]:
            names = [plan.layer.name for plan in some]
            if names[0] not in observations:
                continue
            own = [number for number, solver in enumerate(solvers[names[0]]) if not spread or solver == rank]
            weights = [weight_of(name).to(device).float() for name in names]
            for work in self._solve(some, weights, [observations.pop(name) for name in names], own, preparations):
                name = work.plan.layer.name
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
                    unfinished[name].take(number, here().receive(like, solver, self.clock.device))

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
                    replace_weight(name, self._unpacked(plan, packed))
                self.listen(LayerDone(report))
            solved[name] = packed, report
        return solved

    def _solve(
        self,
        plans: Sequence[LayerPlan],
        originals: Sequence[Float[Tensor, "_ columns"]],
        observations: Sequence[Observation],
        numbers: Sequence[int],
        preparations: Preparations,
    ) -> list[LayerWork]:
        """Strips of a layer, or layers that are solved together; they aim at the weights that their inputs call for."""
        share = self.recipe.calibration.error_correction
        with self.clock.measuring("solve"):
            works = []
            for plan, original, observation in zip(plans, originals, observations, strict=True):
                weight = corrected_target(original, observation, share)
                observation = replace(observation, input_shift=None)  # a matrix as large as the curvature
                works.append(LayerWork(plan, weight, observation, preparations))
            if len(works) > 1:
                solve_together(works)
            else:
                works[0].solve(numbers)
        return works

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
            block.replace_weight(plan.layer.name, self._unpacked(plan, packed))

    def _unpacked(self, plan: LayerPlan, packed: Mapping[str, Shaped[Tensor, "..."]]) -> Float[Tensor, "rows columns"]:
        """The weights of a packed layer, on the run's device."""
        there = {key: tensor.to(self.clock.device) for key, tensor in packed.items()}
        return self.recipe.serializer.unpack(there, plan.layer.columns, plan.size, plan.grid).dequantize()
