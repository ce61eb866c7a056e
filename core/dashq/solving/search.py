"""A search over scales and zeros that ends close to the global optimum of each group, whatever the importances."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.solving.alternation import alternate
from dashq.solving.compiled import Compilable, materialize
from dashq.solving.least_squares import SMALLEST_SCALE, Fit, fit, moments
from dashq.solving.pieces import Piece
from dashq.solving.stored_values import Levels

# First guesses: scales with which the codes cover shares of the weights' range, from `lowest_share` to this one, and
# zeros in a window of so many codes, about where the middle of the range falls on the middle of the codes.
HIGHEST_SHARE = 0.95
SPAN = 3
# Neighbourhoods of the best so far: steps of the scale, to be divided by the largest code, and steps of a real zero.
NEIGHBOURHOODS = ((0.3, 1 / 3), (0.18, 1 / 6))
POLISHING_ROUNDS = 3
# Alternations that the result is never worse than: undamped, and as the paper's settings were reconstructed.
ITERATIONS = 9
DAMPING_AND_RIDGE = ((0.0, 0.0), (0.5, 1e-2))


def search(piece: Piece) -> tuple[Float[Tensor, "1 groups rows"], Float[Tensor, "1 groups rows"]]:
    """Scale and zero with nearly the least Σ h (x - scale · (code - zero))², not yet rounded to the grid's type.

    Guesses over the range of the weights, each with its least-squares fit; then the same twice in a neighbourhood of
    the best; then a short undamped alternation.
    """
    grid, seen = piece.grid, (piece.w, piece.h, piece.origin, piece.mean)
    best = _guess.form(piece.compiled)(*seen, *piece.range, *_first_guesses(piece), piece.levels)
    for scale_step, zero_step in NEIGHBOURHOODS:
        factors, shifts = _steps(scale_step / grid.top, zero_step, piece)
        best = _improve.form(piece.compiled)(*seen, best, factors, shifts, piece.levels)
    scale, zero, _ = alternate(piece, best.scale, best.zero, POLISHING_ROUNDS)
    return scale, zero


def stored_candidates(piece: Piece) -> list[tuple[Float[Tensor, "1 groups rows"], Float[Tensor, "1 groups rows"]]]:
    """Scales and offsets as stored: of min-max rounding, of the search, and of alternations from min-max rounding."""
    scale, offset = piece.minmax
    start = scale, piece.zero(scale, offset)
    found = [alternate(piece, *start, ITERATIONS, *settings)[:2] for settings in DAMPING_AND_RIDGE]
    return [(scale, offset), *(piece.stored(*parameters) for parameters in (search(piece), *found))]


def lowest_share(top: int) -> float:
    """How small a share of the range the codes may come to cover: small where there are few. Fitted to real layers."""
    return max(0.15, 1 - 0.7 * math.pow(3 / top, 0.4))


def _first_guesses(piece: Piece) -> tuple[Tensor, Tensor]:
    """Shares of the range that the codes cover, and zeros as steps from the first, [shares 1 1] and [zeros 1 1]."""
    grid = piece.grid
    scales, zeros = {"real": (6, 7), "integer": (16, SPAN + 1), "symmetric": (48, 1)}[grid.zero]
    shares = torch.linspace(lowest_share(grid.top), HIGHEST_SHARE, scales)
    if grid.negative_scales:
        shares = torch.cat([shares, -shares])
    window = torch.linspace(0, SPAN if grid.zero == "integer" else min(SPAN, grid.top), zeros)
    return shares[:, None, None].to(piece.w), window[:, None, None].to(piece.w)


def _steps(scale_step: float, zero_step: float, piece: Piece) -> tuple[Tensor, Tensor]:
    """Factors of the scale and shifts of the zero, in both directions, [factors 1 1] and [shifts 1 1]."""
    if piece.grid.zero == "symmetric":
        factors, shifts = torch.linspace(-2, 2, 15), torch.zeros(1)
    else:
        factors, shifts = torch.arange(-2.0, 3.0), torch.arange(-1.0, 2.0)
    if piece.grid.zero == "real":
        shifts = zero_step * shifts
    return (1 + scale_step * factors)[:, None, None].to(piece.w), shifts[:, None, None].to(piece.w)


@Compilable
def _guess(
    w: Tensor,
    h: Tensor,
    origin: Tensor,
    mean: Tensor,
    low: Tensor,
    high: Tensor,
    shares: Tensor,
    window: Tensor,
    levels: Levels,
) -> Fit:
    """The best fit to the codes of every pair of a scale, from a share of the range, and a zero of a window."""
    low, high, top = low - origin, high - origin, levels.top
    if levels.zero != "real":
        low, high = low.clamp_max(0), high.clamp_min(0)
    if levels.zero == "symmetric":
        scale = 2 * torch.maximum(-low, high) / top * shares
        scale = torch.where(shares > 0, scale.clamp_min(SMALLEST_SCALE), scale.clamp_max(-SMALLEST_SCALE))
        return _best_fit(w - origin, h, mean, scale, levels.middle.expand_as(scale), levels)
    scale = ((high - low) / top * shares).clamp_min(SMALLEST_SCALE)
    span, step = window[-1], window[1] - window[0]
    centre = top / 2 - (high + low) / 2 / scale
    first = (((centre - span / 2) / step).round() * step).clamp_min(0).minimum(top - span)
    zero = (first[:, None] + window).clamp_min(0).minimum(top)
    return _best_fit(w - origin, h, mean, scale[:, None].expand_as(zero).flatten(0, 1), zero.flatten(0, 1), levels)


@Compilable
def _improve(
    w: Tensor, h: Tensor, origin: Tensor, mean: Tensor, best: Fit, factors: Tensor, shifts: Tensor, levels: Levels
) -> Fit:
    """The best fit to the codes of every pair of a scale and a zero around the best so far; or that one."""
    scale, zero = best.scale * factors, (best.zero + shifts).clamp_min(0).minimum(levels.top)
    pairs = len(factors), len(shifts), *scale.shape[1:]
    scale, zero = scale[:, None].expand(pairs).flatten(0, 1), zero.expand(pairs).flatten(0, 1)
    nearby = _best_fit(w - origin, h, mean, scale, zero, levels)
    return nearby.where(nearby.gain > best.gain, best)


def _best_fit(x: Tensor, h: Tensor, mean: Tensor, scale: Tensor, zero: Tensor, levels: Levels) -> Fit:
    scale, zero = materialize(scale), materialize(zero)
    return fit(moments(x, h, mean, scale, zero, levels), scale, zero, levels).materialize().best()
