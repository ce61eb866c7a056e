"""Scales and offsets that are whole multiples of units which many groups share."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dashq.data import Grid, SuperBlocks

SMALLEST_UNIT = torch.finfo(torch.float16).smallest_normal
LARGEST_UNIT = torch.finfo(torch.float16).max


def store_in_blocks(
    scale: Float[Tensor, "rows groups"], offset: Float[Tensor, "rows groups"], grid: Grid
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """The nearest scales and offsets whose units reach just as far as the largest of each super-block needs."""
    blocks = grid.super_blocks
    assert blocks
    scales = scale.unflatten(1, (-1, blocks.groups))
    if blocks.signed:
        # Multiples reach one further below 0 than above: the largest scale takes that place, whatever its sign.
        largest = scales.gather(-1, scales.abs().argmax(-1, keepdim=True))
        scale = on_unit(scales, as_unit(-largest / (blocks.top + 1)), blocks).flatten(1)
        return scale, -scale * grid.middle
    scale = on_unit(scales, as_unit(scales.amax(-1, keepdim=True) / blocks.top), blocks).flatten(1)
    if blocks.odd:
        return scale, -scale * grid.middle
    mins = (-offset).clamp_min(0).unflatten(1, (-1, blocks.groups))
    unit = as_unit(mins.amax(-1, keepdim=True) / blocks.top)
    return scale, -(unit * (mins / unit).round().clamp(0, blocks.top)).flatten(1)


def on_unit(
    scale: Float[Tensor, "*blocks groups"], unit: Float[Tensor, "*blocks 1"], blocks: SuperBlocks
) -> Float[Tensor, "*blocks groups"]:
    """The nearest scales that are allowed multiples of the unit; none is 0."""
    number = scale / unit
    multiple = number.round()
    if blocks.signed:
        beside_zero = torch.where(number < 0, -1.0, 1.0)
        return unit * torch.where(multiple == 0, beside_zero, multiple).clamp(-blocks.top - 1, blocks.top)
    if blocks.odd:
        return unit * (2 * ((number - 1) / 2).round() + 1).clamp(1, blocks.top)
    return unit * multiple.clamp(1, blocks.top)


def as_unit(values: Float[Tensor, "*blocks"]) -> Float[Tensor, "*blocks"]:
    """Float16 values as float32, away from zero."""
    size = values.abs().clamp(SMALLEST_UNIT, LARGEST_UNIT).half().float()
    return torch.copysign(size, values)


def factor(
    values: Float[Tensor, "blocks groups"], blocks: SuperBlocks, signed: bool = False
) -> tuple[Float[Tensor, "blocks 1"], Int[Tensor, "blocks groups"]]:
    """Units and whole numbers whose products are the values.

    Raises ValueError where a super-block's values are no multiples of one float16 unit.
    """
    # The largest value is its multiple times the unit, and so gives one candidate for the unit for each multiple that
    # it can be. The first one that makes whole numbers of all values of a super-block is taken.
    largest = values.gather(-1, values.abs().argmax(-1, keepdim=True))
    unit, multiple = torch.zeros_like(largest, dtype=torch.float16), torch.zeros_like(values, dtype=torch.int32)
    left = largest[:, 0].nonzero()[:, 0]
    for count in _multiples(blocks, signed):
        if len(left) == 0:
            break
        candidate = (largest[left] / count).half()
        multiples = (values[left] / candidate.float()).round()
        allowed = (multiples >= -blocks.top - 1 if signed else multiples >= 0) & (multiples <= blocks.top)
        if blocks.odd:
            allowed = allowed & (multiples % 2 == 1)
        whole = (allowed & (multiples * candidate.float() == values[left])).all(-1) & candidate[:, 0].isfinite()
        unit[left[whole]], multiple[left[whole]] = candidate[whole], multiples[whole].int()
        left = left[~whole]
    if len(left):
        raise ValueError("the scales and offsets of a super-block are no multiples of one float16 unit")
    return unit, multiple


def _multiples(blocks: SuperBlocks, signed: bool) -> Iterable[int]:
    """The multiples of its unit that the largest value of a super-block can be, the largest first."""
    top = blocks.top
    if not signed:
        return range(top, 0, -2 if blocks.odd else -1)
    return (sign * count for count in range(top + 1, 0, -1) for sign in (-1, 1) if sign * count <= top)
