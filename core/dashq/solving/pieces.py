"""A weight in pieces of some rows and some groups of columns, small enough to stay in the cache while it is solved."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dashq.curvature import Curvature
from dashq.data import Grid, Grouping, Quantized
from dashq.solving.arithmetic import group_importance
from dashq.solving.compiled import Compilable, compiling_pays, materialize
from dashq.solving.least_squares import clip
from dashq.solving.stored_values import Levels, spread, store

# Weights in one piece: few, so that a piece (and, without a compiler, its candidates' codes) stays in the cache, but
# many to each call of a kernel; and many on a graphics processor, which wants few large launches.
WEIGHTS = {"compiled": 1 << 20, "eager": 1 << 14, "cuda": 1 << 23}
ROWS = 64  # of one piece at least, where the layer has them: a few registers full
LINE = 16  # numbers in a line of the cache

# Of every row of every group, as the grid stores them.
ScaleAndOffset = tuple[Float[Tensor, "groups rows"], Float[Tensor, "groups rows"]]


class PieceTensors(NamedTuple):
    """A piece as kernels take it: x = w - origin, with the importances h and `mean`, which is Σ h x."""

    w: Float[Tensor, "size groups rows"]
    h: Float[Tensor, "size groups 1"]
    origin: Float[Tensor, "1 groups rows"]
    mean: Float[Tensor, "1 groups rows"]
    levels: Levels


class Norm(NamedTuple):
    """Σ h (e² + floor)^(p / 2) of residuals e; the floor keeps the weights of small residuals finite."""

    p: float
    floor: Float[Tensor, "1 groups rows"]


class Overview(NamedTuple):
    """Origin, Σ h x, the range of w, and scale and offset of min-max rounding, as stored."""

    origin: Float[Tensor, "1 groups rows"]
    mean: Float[Tensor, "1 groups rows"]
    low: Float[Tensor, "1 groups rows"]
    high: Float[Tensor, "1 groups rows"]
    scale: Float[Tensor, "1 groups rows"]
    offset: Float[Tensor, "1 groups rows"]


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece's weights w, the rows of a column beside one another, and importances h that sum to 1 in each group.

    Solvers work on x = w - origin ≈ scale · (code - zero). On a grid with a real zero the origin is the weighted mean,
    so that the zero of a least-squares fit is the mean code; else it is 0, and zeros are whole numbers.
    """

    w: Float[Tensor, "size groups rows"]
    h: Float[Tensor, "size groups 1"]
    grid: Grid
    compiled: bool = False

    @property
    def origin(self) -> Float[Tensor, "1 groups rows"]:
        """The number that is subtracted from each group's weights."""
        return self._overview.origin

    @property
    def range(self) -> tuple[Float[Tensor, "1 groups rows"], Float[Tensor, "1 groups rows"]]:
        """The smallest and the largest weight."""
        return self._overview.low, self._overview.high

    @property
    def minmax(self) -> tuple[Float[Tensor, "1 groups rows"], Float[Tensor, "1 groups rows"]]:
        """Scale and offset of min-max rounding, as stored."""
        return self._overview.scale, self._overview.offset

    @cached_property
    def levels(self) -> Levels:
        """The grid as kernels take it."""
        return Levels.of(self.grid, self.w)

    @cached_property
    def tensors(self) -> PieceTensors:
        """The piece as kernels take it."""
        return PieceTensors(self.w, self.h, self.origin, self._overview.mean, self.levels)

    def stored(
        self, scale: Float[Tensor, "candidates groups rows"], zero: Float[Tensor, "candidates groups rows"]
    ) -> tuple[Float[Tensor, "candidates groups rows"], Float[Tensor, "candidates groups rows"]]:
        """Scale and offset as the grid's type holds them, the offset refitted to the stored scale."""
        return _stored.form(self.compiled)(self.origin, scale, zero, self.levels)

    def zero(
        self, scale: Float[Tensor, "candidates groups rows"], offset: Float[Tensor, "candidates groups rows"]
    ) -> Float[Tensor, "candidates groups rows"]:
        """The zero that belongs to a scale and an offset."""
        zero = (self.origin - offset) / scale
        return zero if self.grid.zero == "real" else zero.round()

    def best(
        self, *candidates: tuple[Float[Tensor, "_ groups rows"], Float[Tensor, "_ groups rows"]]
    ) -> ScaleAndOffset:
        """For each row the stored scale and offset with the least Σ h (w - ŵ)²; the first of equals."""
        scale, offset = (torch.cat(values) for values in zip(*candidates, strict=True))
        return _best.form(self.compiled)(self.w, self.h, scale, offset, self.levels.top)

    def norms(
        self,
        scale: Float[Tensor, "candidates groups rows"],
        offset: Float[Tensor, "candidates groups rows"],
        norm: Norm,
    ) -> Float[Tensor, "candidates groups rows"]:
        """The norm of e = w - ŵ with each stored scale and offset."""
        half = scale.new_tensor(norm.p / 2)
        return _norms.form(self.compiled)(self.w, self.h, scale, offset, self.levels.top, half, norm.floor)

    @cached_property
    def _overview(self) -> Overview:
        return _look.form(self.compiled)(self.w, self.h, self.levels)


def solve_in_pieces(
    weight: Float[Tensor, "rows columns"],
    curvature: Curvature,
    grouping: Grouping,
    grid: Grid,
    choose: Callable[[Piece], ScaleAndOffset],
) -> Quantized:
    """Round to the stored scales and offsets that `choose` gives for each row of each piece."""
    h, size = group_importance(curvature, grouping).T[..., None], grouping.size
    compiled = compiling_pays(weight.numel())
    rows, groups = _extent(len(weight), grouping, weights_in_a_piece(weight, size, compiled))
    # An odd number of lines from column to column, so that they do not all fall on the same place of the cache.
    buffer = weight.new_empty(groups, size, (-(-rows // LINE) | 1) * LINE).transpose(0, 1)
    scale = weight.new_empty(len(weight), grouping.groups)
    offset, codes = torch.empty_like(scale), weight.new_empty(len(weight), grouping.groups, size, dtype=torch.uint8)
    top = Levels.of(grid, weight).top
    for start in range(0, len(weight), rows):
        for first in range(0, grouping.groups, groups):
            part = slice(start, start + rows), slice(first, first + groups)
            w = grouping.take(weight[part[0]], part[1])
            target = buffer[:, : w.shape[1], : len(w)]
            # Importances of their own: for a view of a tensor of another shape, kernels would be compiled again.
            piece = Piece(_columns_first.form(compiled)(w, target), h[:, part[1]].clone(), grid, compiled)
            s, m = choose(piece)
            scale[part], offset[part] = s.T, m.T
            _encode.form(compiled)(w, scale[part][..., None], offset[part][..., None], top, codes[part])
    return Quantized.of(codes, scale, offset, grouping, grid)


def weights_in_a_piece(weight: Float[Tensor, "rows columns"], size: int, compiled: bool) -> int:
    """The number of weights solved together: few enough that this takes less memory than the layer itself.

    That is half of the layer at most; on a graphics processor, where what is kept of each group's candidates counts, a
    tenth to a quarter of it (bench: solvers).
    """
    kind = "cuda" if weight.is_cuda else "compiled" if compiled else "eager"
    parts = 2 + 256 // size if weight.is_cuda else 2
    return min(WEIGHTS[kind], max(1, weight.numel() // parts))


def _extent(rows: int, grouping: Grouping, weights: int) -> tuple[int, int]:
    """Rows and groups of a piece of at most that many `weights`: all groups of some rows, or a few of `ROWS` rows."""
    most_rows = min(rows, max(1, weights // grouping.size), max(ROWS, weights // grouping.columns))
    return _even(rows, most_rows), _even(grouping.groups, max(1, weights // (grouping.size * most_rows)))


def _even(total: int, most: int) -> int:
    """The size of nearly equal parts, as few as make up the total with at most `most` in each."""
    parts = -(-total // most)
    return -(-total // parts)


@Compilable
def _columns_first(
    w: Float[Tensor, "rows groups size"], target: Float[Tensor, "size groups rows"]
) -> Float[Tensor, "size groups rows"]:
    return target.copy_(w.permute(2, 1, 0))


@Compilable
def _look(w: Float[Tensor, "size groups rows"], h: Float[Tensor, "size groups 1"], levels: Levels) -> Overview:
    mean = materialize((h * w).sum(0, keepdim=True))
    low, high = w.amin(0, keepdim=True), w.amax(0, keepdim=True)
    minmax = spread(low, high, levels)
    if levels.zero != "real":
        return Overview(torch.zeros_like(mean), mean, low, high, *minmax)
    return Overview(mean, (h * (w - mean)).sum(0, keepdim=True), low, high, *minmax)


@Compilable
def _stored(
    origin: Float[Tensor, "1 groups rows"],
    scale: Float[Tensor, "candidates groups rows"],
    zero: Float[Tensor, "candidates groups rows"],
    levels: Levels,
) -> tuple[Float[Tensor, "candidates groups rows"], Float[Tensor, "candidates groups rows"]]:
    stored_scale, _ = store(scale, torch.zeros_like(scale), levels)
    return store(stored_scale, origin - stored_scale * zero, levels)


@Compilable
def _best(
    w: Float[Tensor, "size groups rows"],
    h: Float[Tensor, "size groups 1"],
    scale: Float[Tensor, "candidates groups rows"],
    offset: Float[Tensor, "candidates groups rows"],
    top: Float[Tensor, ""],
) -> ScaleAndOffset:
    error = _residuals(w, scale, offset, top).square()
    least = materialize((h * error).sum(1)).argmin(0, keepdim=True)
    return scale.gather(0, least)[0], offset.gather(0, least)[0]


@Compilable
def _norms(
    w: Float[Tensor, "size groups rows"],
    h: Float[Tensor, "size groups 1"],
    scale: Float[Tensor, "candidates groups rows"],
    offset: Float[Tensor, "candidates groups rows"],
    top: Float[Tensor, ""],
    half: Float[Tensor, ""],
    floor: Float[Tensor, "1 groups rows"],
) -> Float[Tensor, "candidates groups rows"]:
    squared = _residuals(w, scale, offset, top).square()
    return (h * (squared + floor[:, None]).pow(half)).sum(1)


def _residuals(
    w: Float[Tensor, "size groups rows"],
    scale: Float[Tensor, "candidates groups rows"],
    offset: Float[Tensor, "candidates groups rows"],
    top: Float[Tensor, ""],
) -> Float[Tensor, "candidates size groups rows"]:
    """w - ŵ with each stored scale and offset."""
    inverse, scale = materialize(1 / scale)[:, None], scale[:, None]
    d = w - offset[:, None]
    return d - scale * clip((d * inverse).round(), top)


@Compilable
def _encode(
    w: Float[Tensor, "rows groups size"],
    scale: Float[Tensor, "rows groups 1"],
    offset: Float[Tensor, "rows groups 1"],
    top: Float[Tensor, ""],
    codes: UInt8[Tensor, "rows groups size"],
) -> None:
    """Rounds as `arithmetic.encode` does; the largest code is a tensor, so that one kernel serves any bits."""
    codes.copy_(clip(((w - offset) * materialize(1 / scale)).round(), top))
