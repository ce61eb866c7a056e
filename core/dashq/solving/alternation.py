"""Coordinate descent: round the weights to codes, fit scale and zero to the codes, and again."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dashq.solving.compiled import Compilable, materialize
from dashq.solving.least_squares import SMALLEST_SCALE, Moments, fit, moments, nearest_distances
from dashq.solving.pieces import Piece
from dashq.solving.stored_values import Levels

# Residuals below this share of the first scale count as equal, so that no weight of p < 2 is infinite.
RESIDUAL_FLOOR = 1e-2
# Rounds that one call of compiled arithmetic does while a few rows of the piece are in the innermost cache.
ROUNDS_AT_ONCE = 3


def alternate(
    piece: Piece,
    scale: Float[Tensor, "1 groups rows"],
    zero: Float[Tensor, "1 groups rows"],
    iterations: int,
    damping: float = 0.0,
    ridge: float = 0.0,
    p: float = 2.0,
    tolerance: float = 0.0,
    floor: Float[Tensor, "1 groups rows"] | None = None,
) -> tuple[Float[Tensor, "1 groups rows"], Float[Tensor, "1 groups rows"], Int[Tensor, "1 groups rows"]]:
    """Lower Σ h (e² + floor)^(p / 2) from the given scale and zero; the floor has no effect where p is 2.

    Each round keeps the share `damping` of the old scale and offset. Ends when no scale has moved by more than
    `tolerance` of itself and no zero by more than that share of a code. Returns scale, zero, and how many rounds moved
    each row. Undamped and without a ridge no round raises the objective (method: alternation).
    """
    keep, penalty, still = (scale.new_tensor(value) for value in (damping, ridge, tolerance))
    floor = residual_floor(scale) if floor is None else floor
    robust = None if p == 2 else (scale.new_tensor((p - 2) / 2), floor)
    moving = torch.ones_like(scale, dtype=torch.bool)
    rounds = torch.zeros_like(scale, dtype=torch.int32)
    for done in range(0, iterations, ROUNDS_AT_ONCE):
        left = scale.new_tensor(float(iterations - done))
        scale, zero, moving, rounds = _rounds.form(piece.compiled)(
            piece.w, piece.h, piece.origin, piece.mean, scale, zero, moving, rounds, left,
            piece.levels, keep, penalty, still, robust,
        )  # fmt: skip
        if not moving.any():
            break
    return scale, zero, rounds


def residual_floor(scale: Float[Tensor, "1 groups rows"]) -> Float[Tensor, "1 groups rows"]:
    """What is added to squared residuals where p is below 2, for an alternation from this scale."""
    return (RESIDUAL_FLOOR * scale).square().clamp_min(SMALLEST_SCALE)


@Compilable
def _rounds(
    w: Tensor,
    h: Tensor,
    origin: Tensor,
    mean: Tensor,
    scale: Tensor,
    zero: Tensor,
    moving: Tensor,
    rounds: Tensor,
    left: Tensor,
    levels: Levels,
    damping: Tensor,
    ridge: Tensor,
    tolerance: Tensor,
    robust: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As many rounds as are left, at most `ROUNDS_AT_ONCE`; and which rows moved in all of them, and how often."""
    x = w - origin
    for done in range(ROUNDS_AT_ONCE):
        if robust is None:
            found = moments(x, h, mean, scale, zero, levels)
        else:
            found = _robust_moments(x, h, scale, zero, levels, *robust)
        _, s, z = fit(found, scale, zero, levels, ridge)
        damped = torch.lerp(s, scale, damping)
        if levels.zero == "real":
            z = torch.where(damping > 0, torch.lerp(s * z, scale * zero, damping) / damped, z)
        moved = ((damped - scale).abs() > tolerance * scale.abs()) | ((z - zero).abs() > tolerance)
        due = left > done
        moving = torch.where(due, moving & moved, moving)
        rounds = rounds + (moving & due)
        scale, zero = materialize(torch.where(due, damped, scale)), materialize(torch.where(due, z, zero))
    return scale, zero, moving, rounds


def _robust_moments(
    x: Tensor, h: Tensor, scale: Tensor, zero: Tensor, levels: Levels, power: Tensor, floor: Tensor
) -> Moments:
    """The moments with weights h · (e² + floor)^power instead of h, but for a factor."""
    d = nearest_distances(x, scale, zero, levels)
    v = h * ((x - scale[:, None] * d).square() / floor[:, None] + 1).pow(power)
    return Moments(v.sum(1), (v * x).sum(1), (v * d).sum(1), (v * d * d).sum(1), (v * d * x).sum(1))
