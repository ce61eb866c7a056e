"""The run: one straight walk over the model's blocks."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dashq.calibration.layers import Observation
from dashq.calibration.observe import solvers_of
from dashq.calibration.outside import observe_outside
from dashq.calibration.passes import BlockPasses
from dashq.calibration.paused import passes_pause
from dashq.calibration.sequential import OriginalBlock, Stages, corrected_target, probe_of, sequential_stages
from dashq.calibration.shares import Shares
from dashq.calibration.shell import Shell
from dashq.calibration.sources import is_local
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import Drawn, draw_for, draw_to_tune
from dashq.curvature import Curvature
from dashq.data import Grid, Grouping, Quantized
from dashq.device import choose_device, choose_dtype, in_words, limit_kernel_caches, type_name, wait_for
from dashq.errors import CheckpointError, OutputError, PlanError, PluginError
from dashq.measuring.choosing import budget_curve, choices_for, measured, settle
from dashq.measuring.continuation import continuation
from dashq.measuring.judgement import Judge
from dashq.measuring.sensitivity import Analysis
from dashq.model.capacity import check_length
from dashq.model.decoder import OUTSIDE, Block, Model
from dashq.model.location import locate
from dashq.model.outside import parameter_count
from dashq.processes.group import check_alike, here, joined
from dashq.recipe.patterns import check_patterns
from dashq.recipe.plan import LayerPlan, default_serializers, destroying_grids, make_plan, refuse_layer
from dashq.recipe.recipe import Recipe
from dashq.results.clock import Clock
from dashq.results.events import BlockDone, LayerDone, Listener, PhaseBegun, RunBegun, RunDone, RunStarted
from dashq.results.fingerprint import differences, inputs_of
from dashq.results.folder import check_apart, check_folder
from dashq.results.judged import Judgement
from dashq.results.output import Output
from dashq.results.parts import Parts, packed_by, report_by
from dashq.results.report import BudgetCurve, LayerReport, Selection, digest, summarize
from dashq.results.sizes import original_bytes
from dashq.results.tuned import Tuned
from dashq.results.workplace import workplace
from dashq.solving.arithmetic import (
    groups_below_scales,
    groups_without_importance,
    round_to_nearest,
    weighted_error,
    zeros_where_nearer,
)
from dashq.solving.certificate import certify
from dashq.solving.compiled import hearing_compilations
from dashq.strategies import Serializer
from dashq.tuning.planned import optimizer_for, planned_tunables
from dashq.tuning.stage import tune
from dashq.tuning.student import Student
from dashq.tuning.teacher import Teacher

_Solved = tuple[Mapping[str, Tensor], LayerReport]  # a layer's packed tensors, and its report

OUTSIDE_LAYERS = "embeddings and head"  # the part of a result that is made behind the blocks


def open_model(recipe: Recipe) -> Model:
    """The recipe's model on the recipe's device; only headers are read.

    Raises an `OutputError` where the recipe's output would touch the model's files, a `TextError` where a sample has
    more tokens than the model has positions, a `RecipeError` where a regular expression takes too long.
    """
    limit_kernel_caches()
    device = choose_device(recipe.device)
    location = locate(recipe.model, recipe.trust_remote_code)
    check_apart(recipe.output, location)
    model = Model(location, device, choose_dtype(recipe.dtype, device))
    patterns = [override.match.pattern for override in recipe.overrides if override.match]
    if patterns:
        check_patterns(patterns, [*(layer.name for layer in model.all_layers()), *model.unclear_weights()])
    check_length(recipe.calibration.sequence_length, model.network.config, "calibration.sequence_length")
    return model


def plan_model(recipe: Recipe, model: Model) -> tuple[LayerPlan, ...]:
    """A plan for each layer; raises `PlanError` for whatever the layers or the format do not allow.

    Raises `PluginError` where the recipe's tuner would change nothing.
    """
    plans = make_plan(recipe, model.all_layers(), model.unclear_weights())
    try:
        layers = [plan.stored for plan in plans]
        recipe.serializer.check_model(model.network, model.tokenizer(), layers, model.location.file)
    except PlanError as error:
        formats = default_serializers(recipe.registry)
        able = [serializer.name for serializer in formats if _holds_model(serializer, plans, model)]
        raise PlanError(f"{error}. Formats that can hold it: {', '.join(able) or 'none that is installed'}") from error
    if recipe.tuner:
        optimizer_for(recipe.tuner, planned_tunables(model, [plan.stored for plan in plans]))
    return plans


def _holds_model(serializer: Serializer, plans: Sequence[LayerPlan], model: Model) -> bool:
    """True where a format could hold the model with these layers, at their bits and in their groups."""
    try:
        layers = [replace(plan.stored, grid=serializer.grid(plan.grid.bits)) for plan in plans]
        kinds = {(layer.layer.rows, layer.layer.columns, layer.grid, layer.size): layer for layer in layers}
        for layer in kinds.values():
            serializer.pack(layer.empty())
        for layer in layers:
            refuse_layer(layer.layer, serializer)
        serializer.check(layers)
        serializer.check_model(model.network, model.tokenizer(), layers, model.location.file)
    except PlanError:
        return False
    return True


def check_start(recipe: Recipe, model: Model) -> None:
    """Raise a `DashqError` where a run would stop at its text or at its folder; the hub is not asked for a text.

    Nothing is written. A folder that holds an earlier result is none to stop at.
    """
    check_folder(recipe.output, recipe.format_files)
    output = recipe.output.absolute()
    nearest = next(path for path in (output, *output.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise OutputError(f"cannot write to the output folder {output}: see {nearest}")
    if not all(map(is_local, recipe.calibration.dataset)):
        return
    drawn = draw_for(model, recipe.calibration)
    if recipe.tuner and all(map(is_local, recipe.tuner.dataset or ())):
        draw_to_tune(model, recipe, recipe.tuner, drawn)


@torch.no_grad()
def run(recipe: Recipe, listen: Listener = lambda event: None, overwrite: bool = False) -> Path:
    """Quantize a model as the recipe says; returns the folder of the result.

    What the recipe leaves to measurement is measured first, or read from the output folder where it already lies.
    A run that was interrupted goes on after the last block on disk when it is started again. With `overwrite`, an
    earlier result stays as it is until the new one is whole and takes its place.
    Raises a `DashqError` for whatever the recipe, the model, the text or the folder does not allow.
    """
    with joined() as processes:
        if processes.is_first:
            return _lead(recipe, listen, overwrite)
        _follow(recipe)
        return recipe.output


def _lead(recipe: Recipe, listen: Listener, overwrite: bool) -> Path:
    """The run as the first process does it, or the only one; see `run`."""
    clock = Clock(choose_device(recipe.device))
    with clock.measuring("load"):
        model = open_model(recipe)
        choices = choices_for(recipe, model) if recipe.measures else {}
        plans = () if recipe.measures else plan_model(recipe, model)
    weights = sum(layer.weights for layer in model.layers())
    listen(RunBegun(recipe.model, str(recipe.output), len(model.blocks), len(model.layers()), weights))
    with (
        workplace(recipe.output, overwrite, recipe.format_files) as folder,
        hearing_compilations(lambda: listen(PhaseBegun("compiling kernels"))),
    ):
        listen(PhaseBegun("reading text"))
        with clock.measuring("load"):
            tokenizer = model.tokenizer()
            drawn = draw_for(model, recipe.calibration)
            lessons = draw_to_tune(model, recipe, recipe.tuner, drawn) if recipe.tuner else None
            tuner_tokens = lessons.samples if lessons else None
            inputs = inputs_of(model, recipe, drawn.samples, tuner_tokens)
            check_alike(_work_of(recipe, inputs))
        selections: Sequence[Selection] = ()
        curve: BudgetCurve | None = None
        if recipe.measures:
            with clock.measuring("measure"):
                analysis = measured(recipe, model, choices, drawn.samples, inputs, folder, listen)
                here().of_first(lambda: analysis.model_dump(mode="json"))
                curve = budget_curve(recipe, model, analysis)
                recipe, selections = settle(recipe, model, analysis)
                plans = plan_model(recipe, model)
        output = Output(folder, recipe, inputs, clock, overwrite)
        try:
            judgement, tuned = _quantize(recipe, model, drawn, lessons, plans, output, listen)
        except KeyboardInterrupt:
            output.save()
            raise
        if changes := differences(inputs, inputs_of(model, recipe, drawn.samples, tuner_tokens)):
            raise CheckpointError(
                f"{model.location} was changed while it was quantized: {'; '.join(changes)}. --overwrite begins anew"
            )
        listen(PhaseBegun("writing"))
        with clock.measuring("write"):
            output.finish(model.network, tokenizer, model.location, model.location.file)
        computed = in_words(model.device, model.dtype)
        parameters = parameter_count(model.network)
        report = summarize(output.layers, clock, output.bytes_on_disk, computed, parameters, selections, model.warnings)
        report = replace(report, judgement=judgement, tuned=tuned, budget=curve)
        report = replace(report, original=original_bytes(model, [plan.layer for plan in plans]))
        output.report(replace(report, base_model=model.location.repository))
    listen(RunDone(str(recipe.output), report.totals, report.seconds, judgement))
    return recipe.output


def _follow(recipe: Recipe) -> None:
    """The part of every other process in a run: its share of the samples, and the layers that it is to solve.

    It writes nothing, and reads nothing of the output.
    """
    model = open_model(recipe)
    drawn = draw_for(model, recipe.calibration)
    lessons = draw_to_tune(model, recipe, recipe.tuner, drawn) if recipe.tuner else None
    inputs = inputs_of(model, recipe, drawn.samples, lessons.samples if lessons else None)
    check_alike(_work_of(recipe, inputs))
    if recipe.measures:
        analysis = Analysis.model_validate(here().of_first(lambda: None))
        recipe, _ = settle(recipe, model, analysis)
    plans = plan_model(recipe, model)
    walk = _Walk.begin(recipe, model, drawn, plans, Parts(None, Clock(model.device)))
    for block in model.walk():
        walk.go_through(block)
    walk.quantize_outside(model, drawn.samples)


def _work_of(recipe: Recipe, inputs: Mapping[str, str]) -> dict[str, str]:
    """All that processes have to have in common, in words: what a result is made from, the recipe and the threads.

    Folders may have other names on other machines: of the model its files count, and one process writes the output.
    """
    settings = recipe.model_dump(mode="json", exclude={"model", "output"})
    entries = {f"recipe's {key}": str(value) for key, value in settings.items()}
    return {**inputs, **entries, "number of threads": str(torch.get_num_threads())}


def _quantize(
    recipe: Recipe,
    model: Model,
    drawn: Drawn,
    lessons: Drawn | None,
    plans: Sequence[LayerPlan],
    output: Output,
    listen: Listener,
) -> tuple[Judgement, Tuned | None]:
    """Walk over the blocks: quantize those that are not on disk yet; then tune, and judge beside the original model."""
    clock = output.clock
    warnings = (*model.warnings, *destroying_grids(plans))
    computed = in_words(model.device, model.dtype)
    listen(RunStarted(len(model.blocks), len(plans), drawn.samples.numel(), computed, warnings))
    with clock.measuring("calibrate"):
        if OUTSIDE not in output.finished_parts:
            quantized = {f"{plan.layer.name}.weight" for plan in plans}
            with model.outside() as outside:
                output.add(OUTSIDE, {name: tensor for name, tensor in outside.items() if name not in quantized})
        walk = _Walk.begin(recipe, model, drawn, plans, Parts(output, clock), listen)
    with clock.measuring("judge"):
        judge = Judge(model, drawn)
    teacher = None
    if lessons:
        with clock.measuring("tune"):
            teacher = Teacher(model, lessons)
    for block in _read(model, clock):
        with clock.measuring("judge"):
            judge.pass_original(block)
        if teacher:
            with clock.measuring("tune"):
                teacher.pass_original(block)
        walk.go_through(block)
        with clock.measuring("judge"):
            judge.pass_quantized(block)
        listen(BlockDone(block.name, block.index))
    walk.quantize_outside(model, drawn.samples)
    tuned = student = None
    if recipe.tuner and teacher:
        with clock.measuring("tune"):
            tuned, student = tune(recipe, model, teacher, output, listen)
    listen(PhaseBegun("judging"))
    with clock.measuring("judge"):
        if student is None and any(plan.layer.role != "linear" for plan in plans):
            # The blocks that were judged on the way were given the original embeddings.
            student = Student(model, recipe.serializer, output.stored_layers().values(), output.tensors(), learns=False)
        judgement = judge.judgement(student)
        sentence = continuation(model, recipe.serializer, output.stored_layers(), output.tensors())
    return replace(judgement, continuation=sentence), tuned


def _read(model: Model, clock: Clock) -> Iterator[Block]:
    """The model's blocks, one after the other, with the seconds that reading them takes."""
    blocks = model.walk()
    while True:
        with clock.measuring("load"):
            block = next(blocks, None)
        if block is None:
            return
        yield block


@dataclass(frozen=True, eq=False)
class _Walk:
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
    ) -> "_Walk":
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
        replace_weight: Callable[[str, Float[Tensor, "rows columns"]], None] = lambda name, weight: None,
    ) -> list[_Solved]:
        """The tensors and the report of each layer: those with observations are solved here, others elsewhere."""
        solved: dict[str, _Solved] = {}
        device = self.stream.device
        for plan in plans:
            if (name := plan.layer.name) in observations:
                quantized, packed, report = self._solve(
                    plan, weight_of(name).to(device).float(), observations.pop(name)
                )
                replace_weight(name, quantized.dequantize())
                solved[name] = packed, report
        if self.stream.is_spread:
            with self.clock.measuring("exchange"):
                solved = self._exchanged(plans, solved, replace_weight)
        return [solved[plan.layer.name] for plan in plans]

    def _exchanged(
        self,
        plans: Sequence[LayerPlan],
        own: Mapping[str, _Solved],
        replace_weight: Callable[[str, Float[Tensor, "rows columns"]], None],
    ) -> dict[str, _Solved]:
        """The tensors and reports of all layers, each from the process that has solved it."""
        solved, solvers, serializer = {}, solvers_of(plans), self.recipe.serializer
        for plan in plans:
            name = plan.layer.name
            packed, report = own.get(name, ({}, None))
            packed = packed_by(solvers[name], packed, plan.stored, serializer)
            report = report_by(solvers[name], report)
            if name not in own:
                quantized = serializer.unpack(packed, plan.layer.columns, plan.size, plan.grid)
                replace_weight(name, quantized.dequantize())
                self.listen(LayerDone(report))
            solved[name] = packed, report
        return solved

    def _solve(
        self, plan: LayerPlan, original: Float[Tensor, "rows columns"], observation: Observation
    ) -> tuple[Quantized, Mapping[str, Tensor], LayerReport]:
        """One layer, which aims at the weights that its inputs call for, its packed tensors, and its report."""
        with self.clock.measuring("solve"):
            weight = corrected_target(original, observation, self.recipe.calibration.error_correction)
            quantized, report = quantize_layer(plan, weight, observation)
        groups = -(-self.recipe.certificate_groups // len(self.plans))
        if groups and plan.scheme.solver.objective == "groups":
            with self.clock.measuring("certify"):
                certificate = certify(plan.layer.name, weight, quantized, observation.curvature, groups)
            report = replace(report, certificate=certificate)
        self.listen(LayerDone(report))
        return quantized, self.recipe.serializer.pack(quantized), report

    def _restore(self, block: Block) -> None:
        """Put back the quantized weights that an interrupted run has left on disk."""
        for plan in self._plans_by_block[block.name]:
            packed = self.parts.read(block.name, plan.stored, self.recipe.serializer)
            quantized = self.recipe.serializer.unpack(packed, plan.layer.columns, plan.size, plan.grid)
            block.replace_weight(plan.layer.name, quantized.dequantize())


def quantize_layer(
    plan: LayerPlan, weight: Float[Tensor, "rows columns"], observation: Observation
) -> tuple[Quantized, LayerReport]:
    """Group, solve and judge one layer; a `CheckpointError` where its weights do not fit the format's numbers."""
    start = time.perf_counter()
    layer, scheme, grid = plan.layer, plan.scheme, plan.grid
    largest, limit = float(weight.abs().max()), torch.finfo(grid.dtype).max
    if largest > limit:
        raise CheckpointError(
            f"{layer.name}: weights up to {largest:g} do not fit the format's {type_name(grid.dtype)} numbers"
        )
    curvature = observation.curvature
    grouping = scheme.grouper.group(weight, curvature)
    quantized = zeros_where_nearer(weight, scheme.solver.solve(weight, curvature, grouping, grid), curvature)
    wait_for(weight.device)
    seconds = time.perf_counter() - start
    minmax = zeros_where_nearer(weight, round_to_nearest(grouping.split(weight), grid, grouping), curvature)
    report = LayerReport(
        name=layer.name,
        rows=layer.rows,
        columns=layer.columns,
        bits=grid.bits,
        group_size=grouping.size,
        ordered=grouping.order is not None,
        bytes=plan.bytes,
        digest=digest(quantized),
        solver=scheme.solver.name,
        estimator=scheme.estimator.name,
        tokens=observation.tokens,
        expert=layer.expert,
        role=layer.role,
        effective_tokens=observation.effective_tokens,
        shrinkage=observation.shrinkage,
        error=weighted_error(weight, quantized.dequantize(), curvature, observation.row_weights),
        minmax_error=weighted_error(weight, minmax.dequantize(), curvature, observation.row_weights),
        seconds=seconds,
        statistics=_statistics(plan, curvature, quantized),
        fallbacks=(
            *_flat_groups(curvature, grouping),
            *_groups_below_scales(weight, grouping, grid),
            *quantized.fallbacks,
        ),
    )
    return quantized, report


def _statistics(plan: LayerPlan, curvature: Curvature, quantized: Quantized) -> Mapping[str, float]:
    """The figures of the estimator and of the solver; a `PluginError` where both have one of the same name."""
    if shared := curvature.report.keys() & quantized.statistics.keys():
        raise PluginError(
            f"{plan.layer.name}: estimator {plan.scheme.estimator.name!r} and solver {plan.scheme.solver.name!r} both "
            f"report a figure {min(shared)!r}; one of the two has to call it otherwise"
        )
    return {**curvature.report, **quantized.statistics}


def _flat_groups(curvature: Curvature, grouping: Grouping) -> tuple[str, ...]:
    flat = groups_without_importance(curvature, grouping)
    return (f"{flat} of {grouping.groups} groups of columns saw no input: treated as flat",) if flat else ()


def _groups_below_scales(weight: Float[Tensor, "rows columns"], grouping: Grouping, grid: Grid) -> tuple[str, ...]:
    small, groups = groups_below_scales(weight, grouping, grid), len(weight) * grouping.groups
    if not small:
        return ()
    return (
        f"{small} of {groups} groups have weights too small for scales of at least {grid.smallest_scale:.1g}, and are "
        "kept roughly or as zeros: a format with `dtype: bfloat16` holds them",
    )
