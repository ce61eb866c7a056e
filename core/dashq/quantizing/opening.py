"""The beginning of a run: the model is opened, planned and checked, before a weight is read."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dashq.calibration.sources import is_local
from dashq.calibration.tokens import Drawn, draw_for, draw_to_tune
from dashq.device import choose_device, choose_dtype, limit_kernel_caches
from dashq.errors import CheckpointError, OutputError, PlanError
from dashq.model.capacity import check_length
from dashq.model.decoder import Model
from dashq.model.loading import NoLanguageModelError
from dashq.model.location import locate
from dashq.quantizing.kept import bytes_to_keep
from dashq.recipe.patterns import check_patterns
from dashq.recipe.plan import LayerPlan, default_serializers, make_plan, refuse_layer
from dashq.recipe.recipe import Recipe
from dashq.results.folder import check_apart, check_folder
from dashq.strategies import Serializer
from dashq.tuning.planned import optimizer_for, planned_tunables


def open_model(recipe: Recipe) -> Model:
    """The recipe's model on the recipe's device; only headers are read.

    Raises an `OutputError` where the recipe's output would touch the model's files, a `TextError` where a sample has
    more tokens than the model has positions, a `RecipeError` where a regular expression takes too long.
    """
    limit_kernel_caches()
    device = choose_device(recipe.device)
    location = locate(recipe.model, recipe.trust_remote_code)
    check_apart(recipe.output, location)
    if recipe.calibration.keep:
        check_apart(recipe.calibration.keep, location, "folder calibration.keep,")
    try:
        model = Model(location, device, choose_dtype(recipe.dtype, device), recipe.serializer.text_alone)
    except NoLanguageModelError as error:
        able = [form.name for form in recipe.registry.serializers.values() if error.kind in form.text_alone]
        ways = f". Formats that hold its language model alone: {', '.join(able)}" if able else ""
        raise CheckpointError(f"{error}{ways}") from error
    patterns = [override.match.pattern for override in recipe.overrides if override.match]
    if patterns:
        check_patterns(patterns, [*(layer.name for layer in model.all_layers()), *model.unclear_weights()])
    check_length(recipe.calibration.sequence_length, model.network.config, "calibration.sequence_length")
    return model


def plan_model(recipe: Recipe, model: Model) -> tuple[LayerPlan, ...]:
    """A plan for each layer; raises `PlanError` for whatever the layers or the format do not allow.

    Estimators whose sums cannot be kept are refused where the recipe wants to. Raises `PluginError` where the recipe's
    tuner would change nothing.
    """
    plans = make_plan(recipe, model.all_layers(), model.unclear_weights())
    try:
        layers = [plan.stored for plan in plans]
        recipe.serializer.check_model(model.network, model.tokenizer, layers, model.location.file)
    except PlanError as error:
        formats = default_serializers(recipe.registry)
        able = [serializer.name for serializer in formats if _holds_model(serializer, plans, model)]
        raise PlanError(f"{error}. Formats that can hold it: {', '.join(able) or 'none that is installed'}") from error
    if recipe.tuner:
        optimizer_for(recipe.tuner, planned_tunables(model, [plan.stored for plan in plans]))
    if recipe.calibration.keep:
        bytes_to_keep(plans)
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
        serializer.check_model(model.network, model.tokenizer, layers, model.location.file)
    except PlanError:
        return False
    return True


def check_start(recipe: Recipe, model: Model) -> Drawn | None:
    """Raise a `DashqError` where a run would stop at its text or at its folder; the hub is not asked for a text.

    Returns the calibration text, where it is not on the hub. Nothing is written. A folder that holds an earlier result
    is none to stop at.
    """
    check_folder(recipe.output, recipe.format_files)
    _check_writable(recipe.output, "output folder")
    if recipe.calibration.keep:
        _check_writable(recipe.calibration.keep, "folder calibration.keep,")
    if not all(map(is_local, recipe.calibration.dataset)):
        return None
    drawn = draw_for(model, recipe.calibration)
    if recipe.tuner and all(map(is_local, recipe.tuner.dataset or ())):
        draw_to_tune(model, recipe, recipe.tuner, drawn)
    return drawn


def _check_writable(folder: Path, name: str) -> None:
    """Refuse a folder that is none, or that nobody may write into, or make."""
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise OutputError(f"cannot write to the {name} {folder}: see {nearest}")
