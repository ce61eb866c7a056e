"""Tune a finished result: its scales, offsets and norms learn from the original model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from dashq.calibration.tokens import Drawn, draw_for, draw_to_tune
from dashq.device import choose_device, in_words
from dashq.errors import CheckpointError, UsageError
from dashq.measuring.continuation import continuation
from dashq.measuring.judgement import Judge
from dashq.model.decoder import Block, Model
from dashq.model.loading import read_tokenizer
from dashq.model.outside import parameter_count
from dashq.processes.group import check_alike, joined
from dashq.quantizing.opening import open_model
from dashq.recipe.recipe import Recipe
from dashq.registry import Registry, installed_registry
from dashq.results.checkpoint import Checkpoint, open_checkpoint
from dashq.results.clock import Clock
from dashq.results.convert import recipe_of, refuse_changes, repack
from dashq.results.events import BlockDone, Listener, PhaseBegun, RunBegun, RunDone, RunStarted
from dashq.results.fingerprint import file_inputs, inputs_of, work_of
from dashq.results.output import Output
from dashq.results.report import summarize
from dashq.results.workplace import workplace
from dashq.strategies import Tuner
from dashq.tuning.planned import optimizer_for, planned_tunables
from dashq.tuning.stage import follow, read_back, tune
from dashq.tuning.teacher import Teacher


def recipe_to_tune(
    folder: Path, tuner: Tuner | None = None, registry: Registry | None = None, trust_remote_code: bool = False
) -> Recipe:
    """The recipe of the result in `folder` with a tuner, its own unless given, and the folder as its output.

    The recipe of a result can be anybody's: code is trusted only where it is said here. Without a tuner in it and one
    given, it is the only one that is installed.
    Raises `CheckpointError` where it is no whole result of dashq, `UsageError` where it has no tuner and none is given.
    """
    registry = registry or installed_registry()
    source = open_checkpoint(folder, registry, trust_remote_code)
    if source.report is None:
        raise CheckpointError(f"{folder} was not written by dashq: it has no recipe that names the original model")
    recipe = recipe_of(source, registry)
    tuner = tuner or recipe.tuner or _only(registry)
    if tuner is None:
        raise UsageError(
            f"the recipe of {folder} has no tuner: name one with --tuner. Installed: {', '.join(registry.tuners)}"
        )
    return recipe.model_copy(update={"tuner": tuner, "output": folder, "trust_remote_code": trust_remote_code})


@torch.no_grad()
def tune_result(folder: Path, recipe: Recipe, listen: Listener = lambda event: None, overwrite: bool = False) -> Path:
    """Tune the result in `folder` as the recipe, one of `recipe_to_tune`, says; returns the folder of the new result.

    The recipe names the original model, the text, and the output, which may be the same folder: the result is replaced
    when the new one is whole, given `overwrite`. A tuning that was interrupted goes on when it is started again. Raises
    a `DashqError` for whatever the result, the model, the text or the folder does not allow.
    """
    with joined() as processes:
        source = open_checkpoint(folder, recipe.registry, recipe.trust_remote_code)
        if processes.is_first:
            return _lead(source, recipe, listen, overwrite)
        _follow(source, recipe)
        return recipe.output


def _lead(source: Checkpoint, recipe: Recipe, listen: Listener, overwrite: bool) -> Path:
    """The tuning as the first process does it, or the only one; see `tune_result`."""
    assert source.report
    refuse_changes(source.folder, recipe.registry, recipe.trust_remote_code)
    clock = Clock(choose_device(recipe.device))
    with clock.measuring("load"):
        begun = _begin(source, recipe)
    model = begun.model
    computed = in_words(model.device, model.dtype)
    weights = sum(layer.weights for layer in model.layers())
    listen(RunBegun(recipe.model, str(recipe.output), len(model.blocks), len(model.layers()), weights))
    with workplace(recipe.output, overwrite, recipe.format_files) as place:
        output = Output(place, recipe, begun.inputs, clock, overwrite)
        with clock.measuring("write"):
            repack(source, source.report.layers, recipe.serializer, output)
        tokens = begun.lessons.samples.numel()
        listen(RunStarted(len(model.blocks), len(source.layers), tokens, computed, model.warnings))
        with clock.measuring("tune"):
            judge, teacher = _passed(begun, lambda block: listen(BlockDone(block.name, block.index)))
            tuned = tune(recipe, model, teacher, output, listen)
        listen(PhaseBegun("judging"))
        with clock.measuring("judge"):
            judgement = judge.judgement(read_back(recipe, model, output))
            sentence = continuation(model, recipe.serializer, output.stored_layers(), output.tensors())
        with clock.measuring("write"):
            output.finish(model.network, read_tokenizer(source.location), source.location, source.file)
        old = source.report
        report = summarize(
            output.layers,
            clock,
            output.bytes_on_disk,
            computed,
            parameter_count(model.network),
            old.chosen,
            old.warnings,
        )
        judgement = replace(judgement, continuation=sentence)
        report = replace(report, judgement=judgement, tuned=tuned, budget=old.budget, original=old.original)
        output.report(replace(report, base_model=old.base_model, calibration=old.calibration))
    listen(RunDone(str(recipe.output), report.totals, report.seconds, judgement))
    return recipe.output


def _follow(source: Checkpoint, recipe: Recipe) -> None:
    """The part of every other process: its shares of text, steps and judgement.

    It writes nothing, and has read what it needs of the result before the first one replaces it.
    """
    begun = _begin(source, recipe)
    judge, teacher = _passed(begun, lambda block: None)
    follow(recipe, begun.model, teacher)
    judge.judgement(read_back(recipe, begun.model, None))
    continuation(begun.model, recipe.serializer, {}, {})


class _Begun(NamedTuple):
    """The original model, its texts, and all that the new result is made from."""

    model: Model
    drawn: Drawn
    lessons: Drawn
    inputs: dict[str, str]


def _begin(source: Checkpoint, recipe: Recipe) -> _Begun:
    """Open and check the original model, and read the texts, which all processes have in common."""
    assert recipe.tuner
    assert source.report
    model = open_model(recipe)
    _check_model(source, model)
    optimizer_for(recipe.tuner, planned_tunables(model, source.layers.values()))
    drawn = draw_for(model, recipe.calibration)
    lessons = draw_to_tune(model, recipe, recipe.tuner, drawn)
    files = [path for name in source.report.files if (path := source.folder / name).is_file()]
    inputs = inputs_of(model, recipe, drawn.samples, lessons.samples)
    inputs |= {f"{name} of the result": digest for name, digest in file_inputs(files).items()}
    check_alike(work_of(recipe, inputs))
    return _Begun(model, drawn, lessons, inputs)


def _passed(begun: _Begun, listen: Callable[[Block], None]) -> tuple[Judge, Teacher]:
    """The original on the text to judge on and on that to learn from, once all blocks are passed."""
    judge, teacher = Judge(begun.model, begun.drawn, read_back=True), Teacher(begun.model, begun.lessons)
    for block in begun.model.walk():
        judge.pass_original(block)
        teacher.pass_original(block)
        listen(block)
    return judge, teacher


def _only(registry: Registry) -> Tuner | None:
    """The installed tuner with its defaults, where there is no other."""
    return next(iter(registry.tuners.values()))() if len(registry.tuners) == 1 else None


def _check_model(source: Checkpoint, model: Model) -> None:
    """Refuse an original model whose layers are others than those of the result."""
    shapes = {layer.name: (layer.rows, layer.columns) for layer in model.all_layers()}
    for name, stored in source.layers.items():
        shape = (stored.layer.rows, stored.layer.columns)
        if shapes.get(name) != shape:
            has = f"has {name} as {list(shapes[name])}" if name in shapes else f"has no {name}"
            raise CheckpointError(
                f"{source.folder} was not made from {model.location}: it holds {name} as {list(shape)}, the model {has}"
            )
