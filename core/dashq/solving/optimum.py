"""The global optimum of a group, by a sweep over the arrangement of lines on which a code changes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.data import Grid
from dashq.solving.least_squares import SMALLEST_SCALE, Fit, Moments, fit
from dashq.solving.stored_values import Levels

# Events of one batch of groups, which bounds the memory to a few hundred megabytes.
EVENTS_PER_BATCH = 1 << 20


@dataclass(frozen=True, eq=False)
class Optimum:
    """The least Σ h (w - ŵ)² of each group over all codes, scales and zeros of real size, and where it is reached."""

    error: Float[Tensor, " groups"]
    scale: Float[Tensor, " groups"]
    offset: Float[Tensor, " groups"]


def events(size: int, grid: Grid) -> int:
    """The number of changes of a code that the sweep visits in one group, which is its cost."""
    top = grid.top
    if grid.zero == "real":
        return size * size * top * max(1, top - 1)
    signs = 2 if grid.negative_scales else 1
    return signs * size * top * (1 if grid.zero == "symmetric" else top + 1)


def find_optimum(w: Float[Tensor, "groups size"], h: Float[Tensor, "groups size"], grid: Grid) -> Optimum:
    """The global optimum of each group, up to the rounding of float64; the type of the grid's scales is ignored.

    Every best vector of codes is the rounding of the weights for some scale and zero. As those move, a code changes
    on a line of their plane, and each region between the lines touches one of them. So it is enough to walk along
    each line past its crossings with the others, in order, and to know the sums of the codes by adding up changes
    (method: the optimum). With a zero that is a code there is one walk for each zero.
    """
    batch = max(1, EVENTS_PER_BATCH // events(w.shape[1], grid))
    batches = zip(w.double().split(batch), h.double().split(batch), strict=True)
    parts = [_optimum(weights, importances, grid) for weights, importances in batches]
    return Optimum(
        torch.cat([part.error for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.offset for part in parts]),
    )


def _optimum(w: Float[Tensor, "groups size"], h: Float[Tensor, "groups size"], grid: Grid) -> Optimum:
    total = h.sum(1)
    origin = (h * w).sum(1) / total if grid.zero == "real" else torch.zeros_like(total)
    x = w - origin[:, None]
    best = Fit(torch.zeros_like(origin), torch.full_like(origin, SMALLEST_SCALE), torch.full_like(origin, grid.middle))
    for walked in _walks(x, h, grid):
        best = walked.where(walked.gain > best.gain, best)
    error = ((h * x * x).sum(1) - best.gain).clamp_min(0)
    return Optimum(error, best.scale, origin - best.scale * best.zero)


def _walks(x: Float[Tensor, "groups size"], h: Float[Tensor, "groups size"], grid: Grid) -> Iterator[Fit]:
    """Walks that together touch every region of the arrangement."""
    if grid.zero == "real":  # along the lines on which a weight's code turns from `code` - 1 to `code`
        for code in range(1, grid.top + 1):
            yield _walk(x, h, x, code - 0.5, grid)
        return
    for zero in (grid.middle,) if grid.zero == "symmetric" else range(grid.top + 1):
        for sign in (1, -1) if grid.negative_scales else (1,):
            gain, scale, best_zero = _walk(sign * x, h, x.new_zeros(len(x), 1), float(zero), grid)
            yield Fit(gain, sign * scale, best_zero)


def _walk(
    x: Float[Tensor, "groups size"],
    h: Float[Tensor, "groups size"],
    anchors: Float[Tensor, "groups anchors"],
    level: float,
    grid: Grid,
) -> Fit:
    """The best on the lines x = anchor + scale · (code - level), where `level` is a code or half way between two.

    At a scale of 0 every code is the first or the last; as the scale grows, codes turn towards the level, one at each
    crossing. Codes are counted from `zero`, the whole part of the level.
    """
    # A weight's code changes with the scale s where code = (x - anchor) / s + level is half way between two codes: at
    # s = (x - anchor) / (boundary - level). Weights above the anchor come down from the last code, those below it come
    # up from the first, each towards the level, past `turns` boundaries.
    zero = int(level)
    d = x[:, None] - anchors[..., None]  # [groups anchors size]
    above, tied = d > 0, d == 0
    most = max(1, math.ceil(grid.top - 0.5 - level), math.ceil(level - 0.5))
    turns = torch.arange(most, device=x.device)  # the r-th turn is from the r-th code, or from the r-th last
    boundary = torch.where(above[..., None], grid.top - 0.5 - turns, turns + 0.5)
    crossing = d[..., None] / (boundary - level)
    crossing = torch.where((crossing > 0) & crossing.isfinite(), crossing, torch.inf).flatten(-2)
    # All crossings of an anchor's line in order of the scale; each lets one code of one member take one step.
    crossing, order = crossing.sort(-1)
    member, turn = order // most, order % most
    falls = above.gather(-1, member)
    step = torch.where(falls, -1.0, 1.0).double()
    code = torch.where(falls, grid.top - turn, turn) - zero
    hs, xs = h[:, None].expand_as(d), x[:, None].expand_as(d)
    change = torch.where(crossing.isfinite(), hs.gather(-1, member), 0.0) * step
    start = torch.where(tied, 0, torch.where(above, grid.top, 0) - zero)

    def sums(
        at_start: Float[Tensor, "groups anchors size"],
        changes: Float[Tensor, "groups anchors events"],
        if_tied: Float[Tensor, "groups anchors size"],
    ) -> Float[Tensor, "regions groups"]:
        """The sum in each region that the lines touch: of each anchor and side, before the first event and after each.

        Weights on the line itself have the code below it on one side, and above it on the other.
        """
        first = at_start.sum(-1, keepdim=True)
        along = torch.cat([first, first + changes.cumsum(-1)], -1)[..., None, :]
        sides = torch.arange(2 if level % 1 else 1, device=x.device)[:, None]
        return (along + sides * if_tied.sum(-1)[..., None, None]).flatten(1).T

    # Σ h d, Σ h d² and Σ h d x change by h step, h ((d + step)² - d²) = h step (2 d + step) and h x step at a crossing.
    moments = Moments(
        total=h.sum(1)[None],
        x=(h * x).sum(1)[None],
        d=sums(hs * start, change, hs * tied),
        dd=sums(hs * start**2, change * (2 * code + step), hs * tied),
        dx=sums(hs * xs * start, change * xs.gather(-1, member), hs * xs * tied),
    )
    ones = torch.ones_like(moments.d)
    best = fit(moments, ones, zero * ones, Levels.of(grid, ones)).best()
    return Fit(best.gain[0], best.scale[0], best.zero[0])
