"""The run: one straight walk over the model's blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dashq.calibration.tokens import Drawn, draw_for, draw_to_tune
from dashq.device import choose_device, in_words
from dashq.errors import CheckpointError
from dashq.measuring.analysis import Analysis
from dashq.measuring.choosing import budget_curve, choices_for, measured, settle, stored
from dashq.measuring.continuation import continuation
from dashq.measuring.judgement import Judge, is_read_back
from dashq.model.decoder import OUTSIDE, Block, Model
from dashq.model.outside import parameter_count
from dashq.processes.group import check_alike, here, joined
from dashq.quantizing.kept import Kept
from dashq.quantizing.opening import open_model, plan_model
from dashq.quantizing.walk import Walk
from dashq.recipe.plan import LayerPlan, destroying_grids
from dashq.recipe.recipe import Recipe
from dashq.results.clock import Clock
from dashq.results.events import BlockDone, Listener, PhaseBegun, RunBegun, RunDone, RunStarted
from dashq.results.fingerprint import differences, inputs_of, work_of
from dashq.results.judged import Judgement
from dashq.results.output import Output
from dashq.results.parts import Parts
from dashq.results.report import BudgetCurve, Selection, summarize
from dashq.results.sizes import original_bytes
from dashq.results.tuned import Tuned
from dashq.results.workplace import workplace
from dashq.solving.compiled import hearing_compilations
from dashq.tuning.stage import follow, read_back, tune
from dashq.tuning.teacher import Teacher


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
            tokenizer = model.tokenizer
            drawn = draw_for(model, recipe.calibration)
            lessons = draw_to_tune(model, recipe, recipe.tuner, drawn) if recipe.tuner else None
            tuner_tokens = lessons.samples if lessons else None
            inputs = inputs_of(model, recipe, drawn.samples, tuner_tokens)
            check_alike(work_of(recipe, inputs))
        selections: Sequence[Selection] = ()
        curve: BudgetCurve | None = None
        if recipe.measures:
            with clock.measuring("load"):
                analysis = stored(recipe, choices, inputs, (folder, recipe.output))
                here().of_first(lambda: analysis is None)
            if analysis is None:
                with clock.measuring("measure"):
                    analysis = measured(recipe, model, choices, drawn.samples, inputs, folder, listen)
            measurement = analysis.model_dump(mode="json")
            here().of_first(lambda: measurement)
            with clock.measuring("load"):
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
    check_alike(work_of(recipe, inputs))
    if recipe.measures:
        if here().of_first(lambda: None):
            measured(recipe, model, choices_for(recipe, model), drawn.samples, inputs)
        analysis = Analysis.model_validate(here().of_first(lambda: None))
        recipe, _ = settle(recipe, model, analysis)
    plans = plan_model(recipe, model)
    kept = _kept(recipe, model, drawn, plans)
    walk = Walk.begin(recipe, model, drawn, plans, Parts(None, Clock(model.device)), kept=kept)
    reads_back = is_read_back(recipe, plans)
    judge, teacher = Judge(model, drawn, reads_back), Teacher(model, lessons) if lessons else None
    for block in model.walk():
        judge.pass_original(block)
        if teacher:
            teacher.pass_original(block)
        walk.go_through(block)
        judge.pass_quantized(block)
    walk.quantize_outside(model, drawn.samples)
    if teacher:
        follow(recipe, model, teacher)
    judge.judgement(read_back(recipe, model, None) if reads_back else None)
    continuation(model, recipe.serializer, {}, {})


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
    with clock.measuring("load"):
        kept = _kept(recipe, model, drawn, plans)
    warnings = (*model.warnings, *destroying_grids(plans), *(kept.warnings if kept else ()))
    computed, sentence = in_words(model.device, model.dtype), kept.sentence if kept else ""
    listen(RunStarted(len(model.blocks), len(plans), drawn.samples.numel(), computed, warnings, sentence))
    with clock.measuring("take" if kept and kept.taken else "calibrate"):
        if OUTSIDE not in output.finished_parts:
            quantized = {f"{plan.layer.name}.weight" for plan in plans}
            with model.outside() as outside:
                output.add(OUTSIDE, {name: tensor for name, tensor in outside.items() if name not in quantized})
        walk = Walk.begin(recipe, model, drawn, plans, Parts(output, clock), listen, kept)
    reads_back = is_read_back(recipe, plans)
    with clock.measuring("judge"):
        judge = Judge(model, drawn, reads_back)
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
    tuned = None
    if teacher:
        with clock.measuring("tune"):
            tuned = tune(recipe, model, teacher, output, listen)
    listen(PhaseBegun("judging"))
    with clock.measuring("judge"):
        judgement = judge.judgement(read_back(recipe, model, output) if reads_back else None)
        continued = continuation(model, recipe.serializer, output.stored_layers(), output.tensors())
    return replace(judgement, continuation=continued), tuned


def _kept(recipe: Recipe, model: Model, drawn: Drawn, plans: Sequence[LayerPlan]) -> Kept | None:
    """The sums that the run is to keep or to take, with what is on disk of them; None where it does neither."""
    kept = Kept.of(recipe, model, plans, drawn.samples)
    return kept.looked_for() if kept else None


def _read(model: Model, clock: Clock) -> Iterator[Block]:
    """The model's blocks, one after the other, with the seconds that reading them takes."""
    blocks = model.walk()
    while True:
        with clock.measuring("load"):
            block = next(blocks, None)
        if block is None:
            return
        yield block
