"""The search on super-blocks under a diagonal: scales and mins are whole multiples of shared units while it works."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Quantized, SuperBlocks
from dashq.solving import SMALLEST_UNIT, as_unit, group_importance, minmax_parameters, on_unit
from dashq_plugins.solvers.pattern_search import search_patterns

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of a group's range that the codes of a first guess cover
REACHES = (0.8, 0.9, 1.0, 1.1)  # how far the largest multiple reaches, as a share of the largest wanted scale
MOST_ROUNDS = 8
WEIGHTS = 1 << 16  # at once, so that the candidates stay in the cache


# About how long the search takes for a weight on one core, measured: on numbers, on single levels, and on patterns.
NANOSECONDS, LEVELS, PATTERNS = 1000.0, 300.0, 2200.0


def search_nanoseconds(grid: Grid) -> float:
    """About how long the search takes for one weight on one core of a server's CPU."""
    if grid.codebook is None:
        return NANOSECONDS
    return LEVELS if grid.codebook.is_scalar else PATTERNS


class State(NamedTuple):
    """Stored parameters of some super-blocks: ŵ = unit · multiple · (code - zero) - low_unit · low_multiple."""

    unit: Float[Tensor, "blocks 1"]
    multiple: Float[Tensor, "blocks groups"]
    low_unit: Float[Tensor, "blocks 1"]
    low_multiple: Float[Tensor, "blocks groups"]

    @property
    def scale(self) -> Float[Tensor, "blocks groups"]:
        return self.unit * self.multiple

    @property
    def low(self) -> Float[Tensor, "blocks groups"]:
        return self.low_unit * self.low_multiple

    def where(self, better: Bool[Tensor, " blocks"], other: "State") -> "State":
        """This state in the super-blocks where it is better, elsewhere the other."""
        return State(*(torch.where(better[:, None], here, there) for here, there in zip(self, other, strict=True)))


class Blocks(NamedTuple):
    """Weights of some super-blocks, importances of their columns, and their grid."""

    w: Float[Tensor, "blocks groups size"]
    h: Float[Tensor, "groups size"]
    top: int
    zero: float
    kind: SuperBlocks

    def codes(
        self, scale: Float[Tensor, "blocks groups"], low: Float[Tensor, "blocks groups"]
    ) -> Float[Tensor, "blocks groups size"]:
        """The nearest codes less the zero."""
        code = ((self.w + low[..., None]) / scale[..., None] + self.zero).round_().clamp_(0, self.top)
        return code.sub_(self.zero)

    def errors(
        self, scale: Float[Tensor, "blocks groups"], low: Float[Tensor, "blocks groups"]
    ) -> Float[Tensor, "blocks groups"]:
        """Σ h (w - ŵ)² of each group, re-rounded."""
        off = self.w + low[..., None] - scale[..., None] * self.codes(scale, low)
        return (self.h * off * off).sum(-1)


def search_blocks(
    weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
) -> Quantized:
    """Units, multiples and codes of super-blocks with the least Σ h (w - ŵ)² found, all as they will be stored.

    Several units are tried; from the best, steps alternate that never raise the error: the units by least squares for
    fixed codes, then each group's multiples among their neighbours, with codes rounded anew. With a codebook,
    `search_patterns` does it.
    """
    if grid.codebook:
        return search_patterns(weight, _importance(curvature, grouping), grouping, grid)
    kind = grid.super_blocks
    assert kind
    h = _importance(curvature, grouping).unflatten(0, (-1, kind.groups))
    w = grouping.split(weight).unflatten(1, (-1, kind.groups))
    zero = float(grid.middle) if kind.signed else 0.0
    scale, low = w.new_empty(w.shape[:-1]), w.new_empty(w.shape[:-1])
    codes = torch.empty_like(w, dtype=torch.uint8)
    rows = max(1, WEIGHTS // kind.columns)
    for block in range(w.shape[1]):
        for start in range(0, len(w), rows):
            part = slice(start, start + rows)
            blocks = Blocks(w[part, block].contiguous(), h[block], grid.top, zero, kind)
            state = _solve(blocks, grid)
            scale[part, block], low[part, block] = state.scale, state.low
            codes[part, block] = (blocks.codes(state.scale, state.low) + zero).to(torch.uint8)
    scale = scale.flatten(1)
    offset = -scale * zero if kind.signed else -low.flatten(1)
    return Quantized.of(codes.flatten(1, 2), scale, offset, grouping, grid)


def _importance(curvature: Curvature, grouping: Grouping) -> Float[Tensor, "groups size"]:
    """Importances whose groups keep their shares of the whole, which units shared by groups are weighed with."""
    mass = grouping.split_importance(curvature.diagonal().float()).sum(-1, keepdim=True)
    mean = mass.mean()
    mass = mass / mean + 1e-3 if mean > 0 else torch.ones_like(mass)
    return group_importance(curvature, grouping) * mass


def _solve(blocks: Blocks, grid: Grid) -> State:
    """The best of several starts, improved until nothing changes."""
    scale, low = _free(blocks)
    best = _minmax(blocks, grid)
    least = blocks.errors(best.scale, best.low).sum(-1)
    for start in _starts(blocks, scale, low):
        error = blocks.errors(start.scale, start.low).sum(-1)
        best, least = start.where(error < least, best), torch.minimum(error, least)
    for _ in range(MOST_ROUNDS):
        before = least
        for step in (_fit_units, _move_multiples):
            changed = step(blocks, best)
            error = blocks.errors(changed.scale, changed.low).sum(-1)
            best, least = changed.where(error < least, best), torch.minimum(error, least)
        if bool((least >= before * (1 - 1e-5)).all()):
            break
    return best


def _free(blocks: Blocks) -> tuple[Float[Tensor, "blocks groups"], Float[Tensor, "blocks groups"]]:
    """Scales and lows that fit each group best, as if any number could be stored."""
    high, bottom = blocks.w.amax(-1), blocks.w.amin(-1)
    best_scale = best_low = least = None
    for share in SHARES:
        for sign in (1, -1) if blocks.kind.signed else (1,):
            if blocks.kind.signed:
                scale = sign * share * torch.maximum(high, -bottom) / blocks.zero
                low = torch.zeros_like(scale)
            else:
                width = high - bottom.clamp_max(0)
                scale, low = share * width / blocks.top, (-bottom - (1 - share) / 2 * width).clamp_min(0)
            scale = torch.where(scale.abs() < SMALLEST_UNIT, SMALLEST_UNIT, scale)
            for _ in range(2):
                scale, low = _fit_groups(blocks, scale, low)
            error = blocks.errors(scale, low)
            if best_scale is None or best_low is None or least is None:
                best_scale, best_low, least = scale, low, error
            else:
                better = error < least
                best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, low, best_low)
                least = torch.minimum(error, least)
    assert best_scale is not None
    assert best_low is not None
    return best_scale, best_low


def _fit_groups(
    blocks: Blocks, scale: Float[Tensor, "blocks groups"], low: Float[Tensor, "blocks groups"]
) -> tuple[Float[Tensor, "blocks groups"], Float[Tensor, "blocks groups"]]:
    """Least squares in each group for the codes of these parameters, with lows of at least 0."""
    d, h, w = blocks.codes(scale, low), blocks.h, blocks.w
    hd = h * d
    dd, dx = (hd * d).sum(-1), (hd * w).sum(-1)
    alone = dx / dd
    if blocks.kind.signed:
        return torch.where((dd > 0) & (alone != 0), alone, scale), low
    total, sd, x = h.sum(-1).expand_as(dd), hd.sum(-1), (h * w).sum(-1)
    slope = (dx * total - sd * x) / (dd * total - sd * sd)
    best_low = (slope * sd - x) / total
    both = slope.isfinite() & (slope > 0) & (best_low >= 0)
    single = ~both & (dd > 0) & (alone > 0)
    new_scale = torch.where(both, slope, torch.where(single, alone, scale))
    return new_scale, torch.where(both, best_low, torch.where(single, 0.0, low))


def _minmax(blocks: Blocks, grid: Grid) -> State:
    """Min-max rounding, taken apart into units and multiples."""
    scale, offset = minmax_parameters(blocks.w, grid)
    low = torch.zeros_like(offset) if blocks.kind.signed else -offset
    return _on_units(blocks, scale, low, _reach(blocks, scale, 1.0), _low_reach(blocks, low, 1.0))


def _starts(blocks: Blocks, scale: Float[Tensor, "blocks groups"], low: Float[Tensor, "blocks groups"]) -> list[State]:
    """The free fit on units that reach to more or less of the largest scale and low."""
    lows = (1.0,) if blocks.kind.signed else REACHES
    return [
        _on_units(blocks, scale, low, _reach(blocks, scale, reach), _low_reach(blocks, low, low_reach))
        for reach in REACHES
        for low_reach in lows
    ]


def _reach(blocks: Blocks, scale: Float[Tensor, "blocks groups"], share: float) -> Float[Tensor, "blocks 1"]:
    """The unit whose largest multiple is that share of the largest scale of each super-block."""
    largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
    return as_unit(share * (-largest / (blocks.kind.top + 1) if blocks.kind.signed else largest / blocks.kind.top))


def _low_reach(blocks: Blocks, low: Float[Tensor, "blocks groups"], share: float) -> Float[Tensor, "blocks 1"]:
    """The same for lows, which are at least 0."""
    return as_unit(share * low.amax(-1, keepdim=True) / blocks.kind.top)


def _on_units(
    blocks: Blocks,
    scale: Float[Tensor, "blocks groups"],
    low: Float[Tensor, "blocks groups"],
    unit: Float[Tensor, "blocks 1"],
    low_unit: Float[Tensor, "blocks 1"],
) -> State:
    multiple = on_unit(scale, unit, blocks.kind) / unit
    return State(unit, multiple.round(), low_unit, (low / low_unit).round().clamp(0, blocks.kind.top))


def _fit_units(blocks: Blocks, state: State) -> State:
    """The units by least squares over each super-block, for fixed codes and multiples; then as float16 holds them."""
    # ŵ = unit · a + low_unit · b in all columns of a super-block: the two units solve normal equations of 2 × 2.
    a = (state.multiple[..., None] * blocks.codes(state.scale, state.low)).flatten(1)
    b = -state.low_multiple[..., None].expand_as(blocks.w).flatten(1)
    h, w = blocks.h.flatten(), blocks.w.flatten(1)
    aa, ab, bb = (h * a * a).sum(-1), (h * a * b).sum(-1), (h * b * b).sum(-1)
    ax, bx = (h * a * w).sum(-1), (h * b * w).sum(-1)
    determinant = aa * bb - ab * ab
    unit, low_unit = (bb * ax - ab * bx) / determinant, (aa * bx - ab * ax) / determinant
    if not blocks.kind.signed:
        # Where the two together have no allowed solution, the unit of the scales alone is fitted.
        valid = (determinant > 1e-12 * aa * bb) & (unit > 0) & (low_unit > 0)
        alone = (ax - ab * state.low_unit[:, 0]) / aa
        unit = torch.where(valid, unit, torch.where(alone > 0, alone, state.unit[:, 0]))
        low_unit = torch.where(valid, low_unit, state.low_unit[:, 0])
    else:
        unit, low_unit = torch.where(aa > 0, ax / aa, state.unit[:, 0]), state.low_unit[:, 0]
    unit = torch.where(unit.isfinite(), unit, state.unit[:, 0])
    return state._replace(unit=as_unit(unit)[:, None], low_unit=as_unit(low_unit)[:, None])


def _move_multiples(blocks: Blocks, state: State) -> State:
    """Each group's multiples, or their neighbours, whichever fit best with codes rounded anew."""
    top = blocks.kind.top
    best, best_low = state.multiple, state.low_multiple
    least = blocks.errors(state.scale, state.low)
    for step in (-1, 0, 1):
        moved = on_unit((state.multiple + step) * state.unit, state.unit, blocks.kind) / state.unit
        multiple = moved.round()
        for low_step in (0,) if blocks.kind.signed else (-1, 0, 1):
            low_multiple = (state.low_multiple + low_step).clamp(0, top)
            error = blocks.errors(state.unit * multiple, state.low_unit * low_multiple)
            better = error < least
            best, best_low = torch.where(better, multiple, best), torch.where(better, low_multiple, best_low)
            least = torch.minimum(error, least)
    return state._replace(multiple=best, low_multiple=best_low)
