"""A search over scales and zeros that ends close to the global optimum of each group, whatever the importances."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.alternation import alternate
from dashq.data import Grid
from dashq.fitting import SMALLEST_SCALE, Fit
from dashq.pieces import Piece

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


def search(piece: Piece) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Scale and zero with nearly the least Σ h (x - scale · (code - zero))², not yet rounded to the grid's type.

    Guesses over the range of the weights, each with its least-squares fit; then the same twice in a neighbourhood of
    the best; then a short undamped alternation.
    """
    scale, zero = _guesses(piece)
    best = piece.refit(scale, zero).best()
    for scale_step, zero_step in NEIGHBOURHOODS:
        scale, zero = _neighbours(best, scale_step / piece.grid.top, zero_step, piece.grid)
        nearby = piece.refit(scale, zero).best()
        best = nearby.where(nearby.gain > best.gain, best)
    scale, zero, _ = alternate(piece, best.scale, best.zero, POLISHING_ROUNDS)
    return scale, zero


def stored_candidates(piece: Piece) -> list[tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]]:
    """Scales and offsets as stored: of min-max rounding, of the search, and of alternations from min-max rounding."""
    scale, offset = piece.minmax
    start = scale, piece.zero(scale, offset)
    found = [alternate(piece, *start, ITERATIONS, *settings)[:2] for settings in DAMPING_AND_RIDGE]
    return [(scale, offset), *(piece.stored(*parameters) for parameters in (search(piece), *found))]


def lowest_share(top: int) -> float:
    """How small a share of the range the codes may come to cover: small where there are few. Fitted to real layers."""
    return max(0.15, 1 - 0.7 * math.pow(3 / top, 0.4))


def _guesses(piece: Piece) -> tuple[Tensor, Tensor]:
    """Candidate scales and zeros, [rows candidates] each."""
    grid = piece.grid
    low, high = (end - piece.origin for end in piece.range)
    scales, zeros = {"real": (6, 7), "integer": (16, SPAN + 1), "symmetric": (48, 1)}[grid.zero]
    shares = torch.linspace(lowest_share(grid.top), HIGHEST_SHARE, scales, device=low.device)
    if grid.zero != "real":
        low, high = low.clamp_max(0), high.clamp_min(0)
    if grid.zero == "symmetric":
        scale = (2 * torch.maximum(-low, high) / grid.top * shares).clamp_min(SMALLEST_SCALE)
        zero = torch.full_like(scale, grid.middle)
        return (torch.cat([scale, -scale], 1), torch.cat([zero, zero], 1)) if grid.negative_scales else (scale, zero)
    scale = ((high - low) / grid.top * shares).clamp_min(SMALLEST_SCALE)
    span = min(SPAN, grid.top)
    step = span / (zeros - 1) if grid.zero == "real" else 1
    centre = grid.top / 2 - (high + low) / 2 / scale
    first = (((centre - span / 2) / step).round() * step).clamp(0, grid.top - span)
    zero = first[..., None] + step * torch.arange(zeros, device=low.device)
    return scale[..., None].expand_as(zero).flatten(1), zero.clamp(0, grid.top).flatten(1)


def _neighbours(best: Fit, scale_step: float, zero_step: float, grid: Grid) -> tuple[Tensor, Tensor]:
    """Candidates around the best ones, in each direction: scales that are larger and smaller, zeros beside."""
    device = best.scale.device
    if grid.zero == "symmetric":
        factors = 1 + scale_step * torch.linspace(-2, 2, 15, device=device)
        return best.scale * factors, best.zero.expand(-1, len(factors))
    factors = 1 + scale_step * torch.arange(-2, 3, device=device)
    shifts = (zero_step if grid.zero == "real" else 1) * torch.arange(-1, 2, device=device)
    scale = (best.scale * factors)[..., None].expand(-1, -1, len(shifts))
    zero = (best.zero[..., None] + shifts).clamp(0, grid.top).expand_as(scale)
    return scale.flatten(1), zero.flatten(1)
