"""Closed forms: the best scale and zero for given codes, on each kind of grid."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dashq.data import Grid
from dashq.fused import fused

TINY_VARIANCE = 1e-9  # of codes; below, they are all equal and determine no scale
SMALLEST_SCALE = 1e-30  # of a group of equal weights


class Levels(NamedTuple):
    """The codes of a grid as compiled arithmetic takes them: the largest, and what zeros and scales may be."""

    top: Float[Tensor, ""]
    zero: str
    negative_scales: bool

    @classmethod
    def of(cls, grid: Grid, like: Tensor) -> "Levels":
        """The levels of a grid, with the largest code on the device and in the type of `like`."""
        return cls(like.new_tensor(float(grid.top)), grid.zero, grid.negative_scales)


class Moments(NamedTuple):
    """Sums over a group's columns, with weights v ≥ 0 and distances d = code - zero, for each candidate."""

    total: Float[Tensor, "rows #candidates"]  # Σ v
    x: Float[Tensor, "rows #candidates"]  # Σ v x
    d: Float[Tensor, "rows candidates"]  # Σ v d
    dd: Float[Tensor, "rows candidates"]  # Σ v d²
    dx: Float[Tensor, "rows candidates"]  # Σ v d x


class Fit(NamedTuple):
    """Scale and zero, and by how much they lower Σ v x² - (Σ v x)² / Σ v (real zero), or Σ v x² (the others)."""

    gain: Float[Tensor, "rows candidates"]
    scale: Float[Tensor, "rows candidates"]
    zero: Float[Tensor, "rows candidates"]

    def best(self) -> "Fit":
        """The candidate with the largest gain in each row."""
        most = self.gain.argmax(1, keepdim=True)
        return Fit(*(value.gather(1, most) for value in self))

    def where(self, condition: Bool[Tensor, "*shape"], other: "Fit") -> "Fit":
        """This fit where the condition holds, elsewhere the other."""
        return Fit(*(torch.where(condition, mine, its) for mine, its in zip(self, other, strict=True)))


def nearest_distances(
    x: Float[Tensor, "rows 1 size"],
    scale: Float[Tensor, "rows candidates 1"],
    zero: Float[Tensor, "rows candidates 1"],
    levels: Levels,
) -> Float[Tensor, "rows candidates size"]:
    """code - zero for the code whose scale · (code - zero) is nearest to x."""
    return (x * (1 / scale) + zero).round().clamp_min(0).minimum(levels.top) - zero


def moments(
    x: Float[Tensor, "rows size"],
    h: Float[Tensor, " size"],
    mean: Float[Tensor, "rows 1"],
    scale: Float[Tensor, "rows candidates"],
    zero: Float[Tensor, "rows candidates"],
    levels: Levels,
) -> Moments:
    """The moments of the nearest codes, weighted with h, which sums to 1; `mean` is Σ h x."""
    d = nearest_distances(x[:, None], scale[..., None], zero[..., None], levels)
    hd = h * d
    return Moments(torch.ones_like(mean), mean, hd.sum(-1), (hd * d).sum(-1), (hd * x[:, None]).sum(-1))


def fit(
    moments: Moments,
    scale: Float[Tensor, "rows candidates"],
    zero: Float[Tensor, "rows candidates"],
    levels: Levels,
    ridge: Float[Tensor, ""] | float = 0.0,
) -> Fit:
    """The scale and zero that minimise Σ v (x - scale · (code - zero))² + ridge · scale² · Σ v for given codes.

    `moments` were taken with the given zero. Where the codes determine no scale that the grid allows, scale and zero
    stay as given, with a gain of 0. A whole zero is the best of all of them, not the nearest to the best real one.
    """
    if levels.zero == "real":
        return _fit_real(moments, scale, zero, ridge)
    if levels.zero == "symmetric":
        return _fit_scale(moments, zero, scale, zero, levels, ridge)
    total, x, d, dd, dx = moments
    # The gain as a function of the zero has one maximum and one minimum: its best whole zero lies beside the
    # maximum, or at an end.
    peak = zero + ((dx * d - x * dd) / (dx * total - x * d)).nan_to_num(0.0, 0.0, 0.0)
    first, last = torch.zeros_like(zero), levels.top.expand_as(zero)
    best = _fit_scale(moments, first, scale, zero, levels, ridge)
    for tried in (peak.floor().clamp_min(0).minimum(last), peak.ceil().clamp_min(0).minimum(last), last):
        other = _fit_scale(moments, tried, scale, zero, levels, ridge)
        best = other.where(other.gain > best.gain, best)
    return best


def _fit_real(moments: Moments, scale: Tensor, zero: Tensor, ridge: Tensor | float) -> Fit:
    total, x, d, dd, dx = moments
    variance, covariance = dd - d * d / total, dx - d * x / total
    valid = (variance > TINY_VARIANCE * total) & (covariance > 0)
    s = torch.where(valid, covariance / (variance + ridge * total), scale)
    z = torch.where(valid, zero + (d - x / s) / total, zero)
    return Fit(torch.where(valid, covariance * covariance / variance, 0.0), s, z)


def _fit_scale(
    moments: Moments, tried: Tensor, scale: Tensor, zero: Tensor, levels: Levels, ridge: Tensor | float
) -> Fit:
    """The best scale where the zero is `tried`."""
    total, x, d, dd, dx = moments
    shift = tried - zero
    square, product = dd - 2 * shift * d + shift * shift * total, dx - shift * x
    sign = product != 0 if levels.negative_scales else product > 0
    valid = (square > TINY_VARIANCE * total) & sign
    return Fit(
        torch.where(valid, product * product / square, 0.0),
        torch.where(valid, product / (square + ridge * total), scale),
        torch.where(valid, tried, zero),
    )


@fused
def refit(x: Tensor, h: Tensor, mean: Tensor, scale: Tensor, zero: Tensor, levels: Levels) -> Fit:
    """Round with each candidate, and fit: `moments` and `fit` in one pass over the weights."""
    return fit(moments(x, h, mean, scale, zero, levels), scale, zero, levels)
