"""A search over scales and zeros that ends close to the global optimum of each group, whatever the importances."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.solving.alternation import alternate
from dashq.solving.compiled import Compilable, materialize
from dashq.solving.least_squares import SMALLEST_SCALE, Fit, fit, moments
from dashq.solving.pieces import Piece, PieceTensors

# First guesses: scales with which the codes cover shares of the weights' range, from `lowest_share` to this one, and
# zeros in a window of `SPAN` codes, about where the middle of the range falls on the middle of the codes.
HIGHEST_SHARE = 0.95
SPAN = 3
# Neighbourhoods of the best so far: steps of the scale, to be divided by the largest code, and steps of a real zero.
NEIGHBOURHOODS = ((0.3, 1 / 3), (0.18, 1 / 6))
POLISHING_ROUNDS = 3


def search_scales(piece: Piece) -> tuple[Float[Tensor, "1 groups rows"], Float[Tensor, "1 groups rows"]]:
    """Scale and zero with nearly the least Σ h (x - scale · (code - zero))², not yet rounded to the grid's type.

    Guesses over the range of the weights, each with its least-squares fit; then the same twice in a neighbourhood of
    the best; then a short undamped alternation.
    """
    best = _guess.form(piece.compiled)(piece.tensors, *piece.range, *_first_guesses(piece))
    for scale_step, zero_step in NEIGHBOURHOODS:
        factors, shifts = _steps(scale_step / piece.grid.top, zero_step, piece)
        best = _improve.form(piece.compiled)(piece.tensors, best, factors, shifts)
    scale, zero, _ = alternate(piece, best.scale, best.zero, POLISHING_ROUNDS)
    return scale, zero


def lowest_share(top: int) -> float:
    """The smallest share of the range that the codes may come to cover: small where there are few. Fitted to layers."""
    return max(0.15, 1 - 0.7 * math.pow(3 / top, 0.4))


def _first_guesses(piece: Piece) -> tuple[Float[Tensor, "shares 1 1"], Float[Tensor, "zeros 1 1"]]:
    """Shares of the range that the codes cover, and zeros as steps from the first."""
    grid = piece.grid
    scales, zeros = {"real": (6, 7), "integer": (16, SPAN + 1), "symmetric": (48, 1)}[grid.zero]
    shares = torch.linspace(lowest_share(grid.top), HIGHEST_SHARE, scales)
    if grid.negative_scales:
        shares = torch.cat([shares, -shares])
    window = torch.linspace(0, SPAN if grid.zero == "integer" else min(SPAN, grid.top), zeros)
    return shares[:, None, None].to(piece.w), window[:, None, None].to(piece.w)


def _steps(
    scale_step: float, zero_step: float, piece: Piece
) -> tuple[Float[Tensor, "factors 1 1"], Float[Tensor, "shifts 1 1"]]:
    """Factors of the scale and shifts of the zero, in both directions."""
    if piece.grid.zero == "symmetric":
        factors, shifts = torch.linspace(-2, 2, 15), torch.zeros(1)
    else:
        factors, shifts = torch.arange(-2.0, 3.0), torch.arange(-1.0, 2.0)
    if piece.grid.zero == "real":
        shifts = zero_step * shifts
    return (1 + scale_step * factors)[:, None, None].to(piece.w), shifts[:, None, None].to(piece.w)


@Compilable
def _guess(
    piece: PieceTensors,
    low: Float[Tensor, "1 groups rows"],
    high: Float[Tensor, "1 groups rows"],
    shares: Float[Tensor, "shares 1 1"],
    window: Float[Tensor, "zeros 1 1"],
) -> Fit:
    """The best fit to the codes of every pair of a scale, from a share of the range, and a zero of a window."""
    levels, top = piece.levels, piece.levels.top
    low, high = low - piece.origin, high - piece.origin
    if levels.zero != "real":
        low, high = low.clamp_max(0), high.clamp_min(0)
    if levels.zero == "symmetric":
        scale = 2 * torch.maximum(-low, high) / top * shares
        scale = torch.where(shares > 0, scale.clamp_min(SMALLEST_SCALE), scale.clamp_max(-SMALLEST_SCALE))
        return _best_fit(piece, scale, levels.middle.expand_as(scale))
    scale = ((high - low) / top * shares).clamp_min(SMALLEST_SCALE)
    # The window lies about the zero that puts the middle of the range on the middle code, begins at a whole number of
    # its steps, so that whole zeros stay whole, and ends within the codes.
    span, step = window[-1], window[1] - window[0]
    centre = top / 2 - (high + low) / 2 / scale
    first = (((centre - span / 2) / step).round() * step).clamp_min(0).minimum(top - span)
    zero = (first[:, None] + window).clamp_min(0).minimum(top)
    return _best_fit(piece, scale[:, None].expand_as(zero).flatten(0, 1), zero.flatten(0, 1))


@Compilable
def _improve(
    piece: PieceTensors, best: Fit, factors: Float[Tensor, "factors 1 1"], shifts: Float[Tensor, "shifts 1 1"]
) -> Fit:
    """The best fit to the codes of every pair of a scale and a zero around the best so far; or that one."""
    scale, zero = best.scale * factors, (best.zero + shifts).clamp_min(0).minimum(piece.levels.top)
    pairs = len(factors), len(shifts), *scale.shape[1:]
    scale, zero = scale[:, None].expand(pairs).flatten(0, 1), zero.expand(pairs).flatten(0, 1)
    nearby = _best_fit(piece, scale, zero)
    return nearby.where(nearby.gain > best.gain, best)


def _best_fit(
    piece: PieceTensors,
    scale: Float[Tensor, "candidates groups rows"],
    zero: Float[Tensor, "candidates groups rows"],
) -> Fit:
    x, h, mean, levels = piece.w - piece.origin, piece.h, piece.mean, piece.levels
    scale, zero = materialize(scale), materialize(zero)
    return fit(moments(x, h, mean, scale, zero, levels), scale, zero, levels).materialize().best()
