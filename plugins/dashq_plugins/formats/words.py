"""Codes in 32-bit words, and refusals, as the formats of other programs share them."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int32, Num, UInt8
from torch import Tensor, nn
from torch.nn import functional

from dashq import Grid, Grouping, PlanError, Quantized, StoredLayer
from dashq.device import type_name
from dashq_plugins.formats.packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    import transformers


def pack_words(codes: UInt8[Tensor, "rows columns"], bits: int) -> Int32[Tensor, "rows words"]:
    """One little-endian bit stream a row, filled up with zeros to whole words."""
    width = -(-codes.shape[1] * bits // 32) * 4
    if codes.is_meta:
        return codes.new_empty(len(codes), width // 4, dtype=torch.int32)
    stream = pack_bits(codes, bits)
    # `pack_bits` fills up to eight codes, that is to `bits` bytes; words end at the next multiple of four bytes behind
    # the last code, which can be before or after that.
    whole = functional.pad(stream, (0, max(0, width - stream.shape[1])))[:, :width]
    # Flat, since a single row counts as contiguous whatever its stride, and can then not be viewed as words.
    return whole.flatten().view(torch.int32).view(len(codes), width // 4)


def unpack_words(words: Int32[Tensor, "rows words"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The inverse of `pack_words`."""
    stream = words.contiguous().view(torch.uint8)
    return unpack_bits(functional.pad(stream, (0, -stream.shape[1] % bits)), bits, columns)


def refuse_order(quantized: Quantized, format_name: str) -> None:
    """A `PlanError` where the columns were reordered, which no program but dashq reads."""
    if quantized.grouping.order is not None:
        raise PlanError(f"format {format_name} cannot hold columns in another order")


def refuse_short_groups(grouping: Grouping, format_name: str) -> None:
    """A `PlanError` where the groups do not fill the columns."""
    if grouping.columns % grouping.size:
        raise PlanError(
            f"format {format_name} needs groups that fill a row: {grouping.size} does not divide {grouping.columns}"
        )


def refuse_bits(bits: int, possible: tuple[int, ...], format_name: str) -> None:
    """A `PlanError` that names the possible bits where `bits` are others."""
    if bits not in possible:
        raise PlanError(f"format {format_name} holds {', '.join(map(str, possible))} bits, not {bits}")


def refuse_foreign(network: "transformers.PreTrainedModel", layers: Sequence[StoredLayer], format_name: str) -> None:
    """A `PlanError` where a layer is not of the one kind that other programs take for a linear layer."""
    for stored in layers:
        module = network.get_submodule(stored.layer.name)
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise PlanError(
                f"{stored.layer.name}: format {format_name} holds plain linear layers, not a {type(module).__name__}, "
                "whose weight is transposed"
            )


def refuse_stacks(network: "transformers.PreTrainedModel", format_name: str) -> None:
    """A `PlanError` where the model has stacks of experts, which the format's programs know by other names."""
    for name, parameter in network.named_parameters():
        if parameter.dim() == 3:
            raise PlanError(
                f"{name}: the programs of format {format_name} do not find experts under the name that transformers "
                "gives them, quantized or not"
            )


def refuse_uneven_stacks(
    network: "transformers.PreTrainedModel", layers: Sequence[StoredLayer], format_name: str
) -> None:
    """A `PlanError` where experts of one stack are not all quantized alike."""
    stacks: dict[str, list[StoredLayer]] = defaultdict(list)
    for stored in layers:
        if stored.layer.expert is not None:
            stacks[stored.layer.name.rpartition(".")[0]].append(stored)
    for stack, own in stacks.items():
        experts = len(network.get_parameter(stack))
        kinds = {(stored.grid, stored.size) for stored in own}
        if len(own) < experts or len(kinds) > 1:
            settings = sorted({f"{grid.bits} bits in groups of {size}" for grid, size in kinds})
            types = "" if len(settings) == len(kinds) else ", of several types"
            raise PlanError(
                f"{stack}: format {format_name} has one type for all {experts} experts of a stack, and of these "
                f"{len(own)} are quantized, to {' and '.join(settings)}{types}"
            )


def refuse_other_scales(network: "transformers.PreTrainedModel", dtype: str, format_name: str) -> None:
    """A `PlanError` where scales are not of the model's type: transformers would round them, or weights, to another."""
    model = type_name(network.dtype)
    if model != dtype:
        raise PlanError(
            f"the model is of type {model}, and transformers would round numbers to or from scales of type {dtype}: "
            f"take the format `{{name: {format_name}, dtype: {model}}}`, as `serializer` of a recipe or after --to"
        )


def flat_codes(quantized: Quantized) -> UInt8[Tensor, "rows columns"]:
    """The codes row by row, without what fills up the last group."""
    return quantized.codes.flatten(1)[:, : quantized.grouping.columns]


def settings_of(stored: StoredLayer) -> tuple[int, int]:
    """The bits and the group size of a layer, by which programs tell layers apart."""
    return stored.grid.bits, stored.size


def from_whole_zeros(
    codes: UInt8[Tensor, "rows columns"],
    scale: Float[Tensor, "rows groups"],
    zeros: Num[Tensor, "#rows #groups"],
    size: int,
    grid: Grid,
) -> Quantized:
    """The layer with these codes and zeros that are codes, in groups of `size` neighbouring columns."""
    grouping = Grouping(columns=codes.shape[1], size=size)
    offset = -scale.float() * zeros.float()
    return Quantized(codes=grouping.split(codes), scale=scale, offset=offset, grouping=grouping, grid=grid)


def whole_zeros(quantized: Quantized) -> UInt8[Tensor, "rows groups"]:
    """The codes that stand for 0 on a grid where those are codes."""
    if quantized.offset.is_meta:
        return torch.empty_like(quantized.offset, dtype=torch.uint8)
    return quantized.zeros.to(torch.uint8)
