"""Coordinate descent: round the weights to codes, fit scale and zero to the codes, and again."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dashq.fitting import SMALLEST_SCALE, Levels, Moments, fit, moments, nearest_distances
from dashq.fused import fused
from dashq.pieces import Piece

# Residuals below this share of the first scale count as equal, so that no weight of p < 2 is infinite.
RESIDUAL_FLOOR = 1e-2


def alternate(
    piece: Piece,
    scale: Float[Tensor, "rows 1"],
    zero: Float[Tensor, "rows 1"],
    iterations: int,
    damping: float = 0.0,
    ridge: float = 0.0,
    p: float = 2.0,
    tolerance: float = 0.0,
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"], Int[Tensor, "rows 1"]]:
    """Lower Σ h (e² + floor)^(p / 2) from the given scale and zero; the floor is 0 where p is 2.

    Each round keeps the share `damping` of the old scale and offset. Ends when no scale has moved by more than
    `tolerance` of itself and no zero by more than that share of a code. Returns scale, zero, and how many rounds moved
    each row. Undamped and without a ridge no round raises the objective (method: alternation).
    """
    keep, penalty, still = (scale.new_tensor(value) for value in (damping, ridge, tolerance))
    floor = (RESIDUAL_FLOOR * scale).square().clamp_min(SMALLEST_SCALE)
    robust = None if p == 2 else (scale.new_tensor((p - 2) / 2), floor)
    moving = torch.ones_like(scale, dtype=torch.bool)
    rounds = torch.zeros_like(scale, dtype=torch.int32)
    for _ in range(iterations):
        scale, zero, moving = _round(piece.compiled)(
            piece.x, piece.h, piece.mean, scale, zero, moving, piece.levels, keep, penalty, still, robust
        )
        rounds += moving
        if not moving.any():
            break
    return scale, zero, rounds


@fused
def _round(
    x: Tensor,
    h: Tensor,
    mean: Tensor,
    scale: Tensor,
    zero: Tensor,
    moving: Tensor,
    levels: Levels,
    damping: Tensor,
    ridge: Tensor,
    tolerance: Tensor,
    robust: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One round: the new scale and zero, and which rows have moved in all rounds so far."""
    if robust is None:
        found = moments(x, h, mean, scale, zero, levels)
    else:
        found = _robust_moments(x, h, scale, zero, levels, *robust)
    _, s, z = fit(found, scale, zero, levels, ridge)
    damped = torch.lerp(s, scale, damping)
    if levels.zero == "real":
        z = torch.where(damping > 0, torch.lerp(s * z, scale * zero, damping) / damped, z)
    moved = ((damped - scale).abs() > tolerance * scale.abs()) | ((z - zero).abs() > tolerance)
    return damped, z, moving & moved


def _robust_moments(
    x: Tensor, h: Tensor, scale: Tensor, zero: Tensor, levels: Levels, power: Tensor, floor: Tensor
) -> Moments:
    """The moments with weights h · (e² + floor)^power instead of h, but for a factor."""
    x, scale = x[:, None], scale[..., None]
    d = nearest_distances(x, scale, zero[..., None], levels)
    v = h * ((x - scale * d).square() / floor[..., None] + 1).pow(power)
    return Moments(v.sum(-1), (v * x).sum(-1), (v * d).sum(-1), (v * d * d).sum(-1), (v * d * x).sum(-1))
