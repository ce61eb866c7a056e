"""Scales and offsets as a grid stores them."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.data import Grid, Zero
from dashq.solving.super_blocks import store_in_blocks


class Levels(NamedTuple):
    """A grid as compiled arithmetic takes it: with the largest code as a tensor, so that one loop serves any bits."""

    top: Float[Tensor, ""]
    zero: Zero
    negative_scales: bool
    stores_zero: bool
    dtype: torch.dtype

    @property
    def middle(self) -> Float[Tensor, ""]:
        """The code that stands for 0 on a symmetric grid."""
        return (self.top + 1) / 2

    @classmethod
    def of(cls, grid: Grid, like: Float[Tensor, "*shape"]) -> "Levels":
        """The levels of a grid, with the largest code on the device and in the type of `like`."""
        return cls(like.new_tensor(float(grid.top)), grid.zero, grid.negative_scales, grid.stores_zero, grid.dtype)


def spread(
    low: Float[Tensor, "*groups"], high: Float[Tensor, "*groups"], grid: Grid | Levels
) -> tuple[Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """Scale and offset, as the grid stores them, of codes that span `low` and `high`, and 0 if a code stands for 0."""
    if grid.zero == "real":
        in_blocks = isinstance(grid, Grid) and grid.super_blocks is not None
        low = low.clamp_max(0) if in_blocks else low  # offsets of super-blocks are not above zero
        return store((high - low) / grid.top, low, grid)
    low, high = low.clamp_max(0), high.clamp_min(0)
    if isinstance(grid, Grid) and grid.codebook:
        return store(torch.maximum(-low, high) / grid.codebook.levels[-1], low, grid)
    width = high - low if grid.zero == "integer" else 2 * torch.maximum(-low, high)
    return store(width / grid.top, low, grid)


def store(
    scale: Float[Tensor, "*groups"], offset: Float[Tensor, "*groups"], grid: Grid | Levels
) -> tuple[Float[Tensor, "*groups"], Float[Tensor, "*groups"]]:
    """The nearest scale and offset that the grid holds, in float32.

    Scales keep at least the smallest normal number of the grid's type, and their sign where it may be negative.
    """
    if isinstance(grid, Grid) and grid.super_blocks:  # their solvers compile nothing
        return store_in_blocks(scale, offset, grid)
    # In plain operations alone: compiled arithmetic contains this function.
    size = scale.abs() if grid.negative_scales else scale
    size = _as_type(size.clamp_min(torch.finfo(grid.dtype).smallest_normal), grid)
    scale = torch.copysign(size, scale) if grid.negative_scales else size
    if grid.stores_zero:
        return scale, -scale * _as_type(-offset / scale, grid)
    if grid.zero == "real":
        return scale, _as_type(offset, grid)
    if grid.zero == "symmetric":
        return scale, -scale * grid.middle
    return scale, -scale * (-offset / scale).round().clamp_min(0).clamp_max(grid.top)


def _as_type(values: Float[Tensor, "*groups"], grid: Grid | Levels) -> Float[Tensor, "*groups"]:
    """The nearest number of the grid's type, the even one of two; compiled not by a cast, which may be left out."""
    kind = torch.finfo(grid.dtype)
    values = values.clamp(kind.min, kind.max)
    if grid.dtype is torch.float32 or not torch.compiler.is_compiling():
        return values.to(grid.dtype).float()
    # A float32 is sign, 8 bits of exponent, 23 of mantissa, and as an integer it grows with its size. The type keeps
    # the mantissa's upper bits: adding just under half of the lowest one that it keeps, and a little more where that
    # one is odd, carries into it where it is to be rounded up, into the exponent too; the bits below it are cut off.
    unit = round(kind.eps / torch.finfo(torch.float32).eps)  # numbers of float32 from one of the type to the next
    bits = values.view(torch.int32)
    odd = bits.bitwise_and(unit).ne(0)
    nearest = (bits + (unit // 2 - 1) + odd).bitwise_and(-unit).view(torch.float32)
    if grid.dtype is torch.bfloat16:
        return nearest
    step = kind.smallest_normal * kind.eps  # from one number to the next where float16 has no exponent left
    return torch.where(values.abs() < kind.smallest_normal, (values * (1 / step)).round() * step, nearest)
