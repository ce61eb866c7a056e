"""A weight in pieces of one group of columns and some rows, small enough to stay in the cache while it is solved."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.arithmetic import group_importance, spread, store
from dashq.data import Curvature, Grid, Grouping, Quantized
from dashq.fitting import Fit, Levels, refit
from dashq.fused import fused

# Layers with fewer weights are not worth the seconds that compiling or loading a kernel takes (bench: solvers).
COMPILE_FROM = 1 << 16
# Weights in one piece: few, so that a piece (and, without a compiler, its candidates' codes) stays in the cache; many
# on a graphics processor, which wants few large launches.
WEIGHTS = {"compiled": 1 << 19, "eager": 1 << 14, "cuda": 1 << 22}

Choice = tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of one group of columns: weights w, and importances h that sum to 1.

    Solvers work on x = w - origin ≈ scale · (code - zero). On a grid with a real zero the origin is the weighted mean,
    so that the zero of a least-squares fit is the mean code; else it is 0, and zeros are whole numbers.
    """

    w: Float[Tensor, "rows size"]
    h: Float[Tensor, " size"]
    grid: Grid
    compiled: bool = False

    @property
    def origin(self) -> Float[Tensor, "rows 1"]:
        """What is subtracted from the weights."""
        return self._seen[0]

    @property
    def x(self) -> Float[Tensor, "rows size"]:
        """The weights as seen from the origin."""
        return self._seen[1]

    @property
    def mean(self) -> Float[Tensor, "rows 1"]:
        """Σ h x."""
        return self._seen[2]

    @property
    def range(self) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
        """The smallest and the largest weight."""
        return self._seen[3], self._seen[4]

    @cached_property
    def levels(self) -> Levels:
        """The grid as compiled arithmetic takes it."""
        return Levels.of(self.grid, self.w)

    @property
    def minmax(self) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
        """Scale and offset of min-max rounding, as stored."""
        return spread(*self.range, self.grid)

    def refit(self, scale: Float[Tensor, "rows candidates"], zero: Float[Tensor, "rows candidates"]) -> Fit:
        """The least-squares fit to each candidate's codes."""
        return refit(self.compiled)(self.x, self.h, self.mean, scale, zero, self.levels)

    def stored(
        self, scale: Float[Tensor, "rows candidates"], zero: Float[Tensor, "rows candidates"]
    ) -> tuple[Float[Tensor, "rows candidates"], Float[Tensor, "rows candidates"]]:
        """Scale and offset as the grid's type holds them, the offset refitted to the stored scale."""
        kept, _ = store(scale, torch.zeros_like(scale), self.grid)
        return store(kept, self.origin - kept * zero, self.grid)

    def zero(
        self, scale: Float[Tensor, "rows candidates"], offset: Float[Tensor, "rows candidates"]
    ) -> Float[Tensor, "rows candidates"]:
        """The zero that belongs to a scale and an offset."""
        zero = (self.origin - offset) / scale
        return zero if self.grid.zero == "real" else zero.round()

    def best(self, *choices: tuple[Tensor, Tensor]) -> Choice:
        """For each row the stored scale and offset with the least Σ h (w - ŵ)²; the first of equals."""
        scale, offset = (torch.cat(values, dim=1) for values in zip(*choices, strict=True))
        least = _errors(self.compiled)(self.w, self.h, scale, offset, self.levels.top).argmin(1, keepdim=True)
        return scale.gather(1, least)[:, 0], offset.gather(1, least)[:, 0]

    @cached_property
    def _seen(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _see(self.compiled)(self.w, self.h, self.grid.zero == "real")


def solve_in_pieces(
    weight: Float[Tensor, "rows columns"],
    curvature: Curvature,
    grouping: Grouping,
    grid: Grid,
    choose: Callable[[Piece], Choice],
) -> Quantized:
    """Ask `choose` for the stored scale and offset of every row of every piece, and round to them."""
    h, groups = group_importance(curvature, grouping), grouping.split(weight)
    compiled = weight.numel() >= COMPILE_FROM
    kind = "cuda" if weight.is_cuda else "compiled" if compiled else "eager"
    rows = max(1, WEIGHTS[kind] // grouping.size)
    scale = weight.new_empty(len(weight), grouping.groups)
    offset, codes = torch.empty_like(scale), torch.empty_like(groups, dtype=torch.uint8)
    for group in range(grouping.groups):
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            piece = Piece(groups[part, group].contiguous(), h[group], grid, compiled)
            s, m = choose(piece)
            scale[part, group], offset[part, group] = s, m
            codes[part, group] = _codes(compiled)(piece.w, s[:, None], m[:, None], piece.levels.top)
    return Quantized(
        codes=codes,
        scale=scale.to(grid.dtype),
        offset=offset.to(grid.offset_dtype),
        grouping=grouping,
        grid=grid,
    )


@fused
def _see(w: Tensor, h: Tensor, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Origin, x, Σ h x, and the range of w."""
    mean = (h * w).sum(-1, keepdim=True)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if not centred:
        return torch.zeros_like(mean), w, mean, low, high
    x = w - mean
    return mean, x, (h * x).sum(-1, keepdim=True), low, high


@fused
def _errors(w: Tensor, h: Tensor, scale: Tensor, offset: Tensor, top: Tensor) -> Tensor:
    scale, d = scale[..., None], w[:, None] - offset[..., None]
    e = d - scale * _nearest(d / scale, top)
    return (h * e * e).sum(-1)


@fused
def _codes(w: Tensor, scale: Tensor, offset: Tensor, top: Tensor) -> Tensor:
    return _nearest((w - offset) / scale, top).to(torch.uint8)


def _nearest(code: Tensor, top: Tensor) -> Tensor:
    """As `arithmetic.encode` rounds; the largest code is a tensor, so that one kernel serves any number of bits."""
    return code.round().clamp_min(0).minimum(top)
