"""Pack a result anew in another format, where that loses nothing."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Shaped
from pydantic import ValidationError
from torch import Tensor

from dashq.data import Grid, Quantized, StoredLayer, size_of
from dashq.device import type_name
from dashq.errors import CheckpointError, PlanError
from dashq.model.loading import network_of, read_tokenizer
from dashq.model.outside import parameter_count
from dashq.recipe.plan import FormatRefusal, advised, default_serializers, in_short, refuse_layer
from dashq.recipe.recipe import Recipe, expanded
from dashq.registry import Registry, installed_registry
from dashq.results.checkpoint import Checkpoint, open_checkpoint
from dashq.results.clock import Clock
from dashq.results.fingerprint import file_inputs
from dashq.results.folder import RECIPE, check_apart
from dashq.results.output import Output
from dashq.results.report import LayerReport, summarize, versions
from dashq.results.verify import verify
from dashq.results.workplace import workplace
from dashq.solving.super_blocks import factor
from dashq.strategies import Serializer
from dashq.strict import first_mistake


@torch.no_grad()
def convert(
    folder: Path,
    serializer: Serializer,
    output: Path,
    overwrite: bool = False,
    registry: Registry | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the result in `folder` as the serializer packs it; returns the folder of the new result.

    `registry` has the strategies that the result was made with; without one those of the installed plugins. Code that
    lies in the folder runs only with `trust_remote_code`. Raises `PlanError` that says what would have to be solved
    again where the new format cannot hold it unchanged, `CheckpointError` where `folder` is no whole result of dashq,
    `OutputError` where `output` cannot be used.
    """
    registry = registry or installed_registry()
    source = open_checkpoint(folder, registry, trust_remote_code)
    output = expanded(output)
    check_apart(output, source.location)
    if source.report is None:
        raise CheckpointError(f"{folder} was not written by dashq: it has no recipe to convert")
    refuse_changes(folder, registry, trust_remote_code)
    recipe = recipe_of(source, registry)
    with torch.device("meta"):
        network = network_of(source.config(), source.location)
    tokenizer = read_tokenizer(source.location)
    _refuse_layers(source, serializer, registry)
    layers = _refuse_losses(source, serializer, registry)
    serializer.check(layers)
    serializer.check_model(network, tokenizer, layers, source.file)
    recipe = recipe.model_copy(update={"serializer": serializer, "output": output})
    inputs = file_inputs([path for name in source.report.files if (path := folder / name).is_file()]) | versions()
    with workplace(output, overwrite, recipe.format_files) as place:
        clock = Clock(torch.device("cpu"))
        target = Output(place, recipe, inputs, clock, overwrite)
        with clock.measuring("write"):
            repack(source, source.report.layers, serializer, target)
            target.finish(network, tokenizer, source.location, source.file)
        old = source.report
        report = summarize(
            target.layers, clock, target.bytes_on_disk, old.computed, parameter_count(network), old.chosen, old.warnings
        )
        report = replace(report, judgement=old.judgement, tuned=old.tuned, budget=old.budget)
        report = replace(report, calibration=old.calibration)
        target.report(replace(report, base_model=old.base_model, original=old.original))
    return output


def refuse_changes(folder: Path, registry: Registry, trust_remote_code: bool) -> None:
    """Refuse a result that is not what its run wrote, with a `CheckpointError` that says where.

    Files that lie beside the weights are the user's to change.
    """
    checks = verify(folder, None, registry, trust_remote_code)
    changed = [check.name for check in checks if not check.passed and check.kind in ("layers", "tensors", "settings")]
    if changed:
        raise CheckpointError(
            f"{folder} is not as its run wrote it, and `dashq verify` says where: {in_short(changed)}. Quantize the "
            "model again"
        )


def recipe_of(source: Checkpoint, registry: Registry) -> Recipe:
    """The recipe that a result was made with; a `CheckpointError` where it is not as dashq writes it."""
    try:
        return Recipe.model_validate(dict(source.recipe), context=registry)
    except ValidationError as error:
        raise CheckpointError(f"{source.folder / RECIPE} is not as dashq writes it: {first_mistake(error)}") from error


def repack(source: Checkpoint, layers: Sequence[LayerReport], serializer: Serializer, target: Output) -> None:
    """Put every tensor into the new result, those of quantized layers packed anew."""
    for name in source.unpacked_tensors():
        if name not in target.finished_parts:
            target.add(name, {name: source.tensors[name][...]})
    for layer in layers:
        if layer.name not in target.finished_parts:
            tensors = _pack(source, layer.name, serializer)
            named = {f"{layer.name}.{key}": tensor for key, tensor in tensors.items()}
            own = serializer.name_of(_grid(source.layers[layer.name].grid, serializer))
            target.add(layer.name, named, [replace(layer, bytes=size_of(tensors.values()), type=own)])


def regrid(quantized: Quantized, grid: Grid) -> Quantized:
    """The same numbers on another grid; a `PlanError` where it does not have them."""
    q, old = quantized, quantized.grid
    if old.bits != grid.bits:
        raise PlanError(f"it holds {grid.bits} bits, not {old.bits}")
    if old.codebook != grid.codebook:
        raise PlanError("its codes stand for other values")
    scale, offset = q.scale.to(grid.dtype), q.offset.to(grid.offset_dtype)
    s, m = q.scale.float(), q.offset.float()
    if not scale.float().equal(s):
        raise PlanError(
            f"its scales are {type_name(grid.dtype)}, which does not hold those of {type_name(q.scale.dtype)}"
        )
    if not grid.negative_scales and bool((s <= 0).any()):
        raise PlanError("its scales are above zero")
    if grid.super_blocks:
        _require_units(q, grid)
    elif grid.stores_zero and not (-s * (-m / s).to(grid.dtype).float()).equal(m):
        raise PlanError(f"it stores zeros as {type_name(grid.dtype)}, and these zeros are others")
    if not offset.float().equal(m):
        raise PlanError(
            f"its offsets are {type_name(grid.offset_dtype)}, which does not hold those of {type_name(q.offset.dtype)}"
        )
    if grid.zero != "real":
        zero = (-m / s).round()
        inside = zero == grid.middle if grid.zero == "symmetric" else (zero >= 0) & (zero <= grid.top)
        if not (bool(inside.all()) and (-s * zero).equal(m)):
            raise PlanError(f"its zeros are {grid.zero}, and these are {old.zero}")
    return replace(q, scale=scale, offset=offset, grid=grid)


def _require_units(q: Quantized, grid: Grid) -> None:
    super_blocks = grid.super_blocks
    assert super_blocks
    if q.grid.super_blocks == super_blocks:
        return
    try:
        factor(q.scale.float().reshape(-1, super_blocks.groups), super_blocks, super_blocks.signed)
        if super_blocks.has_offsets:
            factor(-q.offset.float().reshape(-1, super_blocks.groups), super_blocks)
    except (ValueError, RuntimeError) as error:
        raise PlanError("its scales and offsets are multiples of a super-block's unit, and these are not") from error


def _refuse_layers(source: Checkpoint, serializer: Serializer, registry: Registry) -> None:
    for stored in source.layers.values():
        try:
            refuse_layer(stored.layer, serializer)
        except PlanError as error:
            refusal = FormatRefusal(str(error), stored.layer, stored.grid.bits, stored.size, stored.ordered)
            raise PlanError(f"{stored.layer.name}: {advised(refusal, registry)}") from error


def _refuse_losses(source: Checkpoint, serializer: Serializer, registry: Registry) -> list[StoredLayer]:
    """The layers as they will lie in the new format, where it holds all of them unchanged."""
    refusals: dict[str, list[str]] = defaultdict(list)
    for name in source.layers:
        try:
            _pack(source, name, serializer)
        except PlanError as error:
            refusals[str(error)].append(name)
    if refusals:
        reasons = "; ".join(f"{in_short(names)}: {reason}" for reason, names in refusals.items())
        others = [other for other in default_serializers(registry) if other.name != source.serializer.name]
        able = [other.name for other in others if _holds_all(source, other)]
        raise PlanError(
            f"format {serializer.name!r} cannot hold {source.folder} unchanged; these layers would have to be solved "
            f"again: {reasons}. `dashq run {source.folder / RECIPE} --set serializer={serializer.name} --set "
            f"output=NEW` solves them again; formats that hold all layers unchanged: {', '.join(able) or 'none'}"
        )
    return [replace(layer, grid=_grid(layer.grid, serializer)) for layer in source.layers.values()]


def _holds_all(source: Checkpoint, serializer: Serializer) -> bool:
    """True where a format holds every layer unchanged."""
    try:
        for name, stored in source.layers.items():
            refuse_layer(stored.layer, serializer)
            _pack(source, name, serializer)
    except PlanError:
        return False
    return True


def _pack(source: Checkpoint, name: str, serializer: Serializer) -> Mapping[str, Shaped[Tensor, "..."]]:
    """A layer packed anew; a `PlanError` where the format does not hold it unchanged."""
    quantized = source.quantized(name)
    return serializer.pack(regrid(quantized, _grid(quantized.grid, serializer)))


def _grid(grid: Grid, serializer: Serializer) -> Grid:
    """The grid that a layer has in a new format: its own where the format has that, else the usual one of its bits."""
    usual = serializer.grid(grid.bits)
    return grid if grid in serializer.types(grid.bits).values() else usual
