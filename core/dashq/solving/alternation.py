"""Coordinate descent: round the weights to codes, fit scale and zero to the codes, and again."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dashq.solving.compiled import Compilable, materialize
from dashq.solving.least_squares import SMALLEST_SCALE, Moments, fit, moments, nearest_distances
from dashq.solving.pieces import Norm, Piece, PieceTensors
from dashq.solving.stored_values import Levels

# Residuals below this share of the first scale count as equal, so that no weight of p < 2 is infinite.
RESIDUAL_FLOOR = 1e-2
# Rounds that one call of compiled arithmetic does while a few rows of the piece are in the innermost cache.
ROUNDS_AT_ONCE = 3


class Descent(NamedTuple):
    """Settings of an alternation.

    Each round keeps the share `damping` of the old scale and offset, and adds `ridge` to the variance that a scale is
    divided by. A row rests when its scale moves by no more than `tolerance` of itself, and its zero by no more than
    that share of a code.
    """

    damping: float = 0.0
    ridge: float = 0.0
    tolerance: float = 0.0


class DescentTensors(NamedTuple):
    """Those settings as kernels take them, so that one kernel serves any of them."""

    damping: Float[Tensor, ""]
    ridge: Float[Tensor, ""]
    tolerance: Float[Tensor, ""]


class Progress(NamedTuple):
    """The state of an alternation, with the rows that moved in all rounds so far, and the number of those rounds."""

    scale: Float[Tensor, "1 groups rows"]
    zero: Float[Tensor, "1 groups rows"]
    moving: Bool[Tensor, "1 groups rows"]
    rounds: Int[Tensor, "1 groups rows"]


class Reweighting(NamedTuple):
    """Weights (e² + floor)^power of residuals e, by which least squares lowers a `Norm`."""

    power: Float[Tensor, ""]
    floor: Float[Tensor, "1 groups rows"]


def alternate(
    piece: Piece,
    scale: Float[Tensor, "1 groups rows"],
    zero: Float[Tensor, "1 groups rows"],
    iterations: int,
    descent: Descent | None = None,
    norm: Norm | None = None,
) -> tuple[Float[Tensor, "1 groups rows"], Float[Tensor, "1 groups rows"], Int[Tensor, "1 groups rows"]]:
    """Lower Σ h e², or the `norm` of the residuals e, from the given scale and zero.

    Ends after `iterations` rounds, or when all rows rest. Returns scale, zero, and how many rounds moved each row.
    Undamped and without a ridge, as by default, no round raises the objective (method: the alternation).
    """
    settings = DescentTensors(*(scale.new_tensor(value) for value in descent or Descent()))
    robust = None if norm is None else Reweighting(scale.new_tensor((norm.p - 2) / 2), norm.floor)
    moving = torch.ones_like(scale, dtype=torch.bool)
    progress = Progress(scale, zero, moving, torch.zeros_like(scale, dtype=torch.int32))
    for done in range(0, iterations, ROUNDS_AT_ONCE):
        left = scale.new_tensor(float(iterations - done))
        progress = _rounds.form(piece.compiled)(piece.tensors, progress, left, settings, robust)
        if not progress.moving.any():
            break
    return progress.scale, progress.zero, progress.rounds


def residual_floor(scale: Float[Tensor, "1 groups rows"]) -> Float[Tensor, "1 groups rows"]:
    """The floor of a `Norm` with p below 2, for an alternation from this scale."""
    return (RESIDUAL_FLOOR * scale).square().clamp_min(SMALLEST_SCALE)


@Compilable
def _rounds(
    piece: PieceTensors,
    progress: Progress,
    left: Float[Tensor, ""],
    descent: DescentTensors,
    robust: Reweighting | None,
) -> Progress:
    """As many rounds as are left, at most `ROUNDS_AT_ONCE`."""
    h, mean, levels = piece.h, piece.mean, piece.levels
    scale, zero, moving, rounds = progress
    x = piece.w - piece.origin
    for done in range(ROUNDS_AT_ONCE):
        if robust is None:
            sums = moments(x, h, mean, scale, zero, levels)
        else:
            sums = _robust_moments(x, h, scale, zero, levels, robust)
        _, s, z = fit(sums, scale, zero, levels, descent.ridge)
        damped = torch.lerp(s, scale, descent.damping)
        if levels.zero == "real":
            z = torch.where(descent.damping > 0, torch.lerp(s * z, scale * zero, descent.damping) / damped, z)
        moved = ((damped - scale).abs() > descent.tolerance * scale.abs()) | ((z - zero).abs() > descent.tolerance)
        # The number of rounds is part of the compiled loop; those that are not due leave everything as it is.
        due = left > done
        moving = torch.where(due, moving & moved, moving)
        rounds = rounds + (moving & due)
        scale, zero = materialize(torch.where(due, damped, scale)), materialize(torch.where(due, z, zero))
    return Progress(scale, zero, moving, rounds)


def _robust_moments(
    x: Float[Tensor, "size groups rows"],
    h: Float[Tensor, "size groups 1"],
    scale: Float[Tensor, "1 groups rows"],
    zero: Float[Tensor, "1 groups rows"],
    levels: Levels,
    robust: Reweighting,
) -> Moments:
    """The moments with weights h · (e² + floor)^power instead of h, but for a factor."""
    d = nearest_distances(x, scale, zero, levels)
    # (e² / floor + 1)^power: the factor floor^power is left out, which is the same for all columns of a group.
    v = h * ((x - scale[:, None] * d).square() / robust.floor[:, None] + 1).pow(robust.power)
    return Moments(v.sum(1), (v * x).sum(1), (v * d).sum(1), (v * d * d).sum(1), (v * d * x).sum(1))
