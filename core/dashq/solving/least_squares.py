"""Closed forms: the best scale and zero for given codes, on each kind of grid."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dashq.solving.compiled import materialize
from dashq.solving.stored_values import Levels

TINY_VARIANCE = 1e-9  # of codes; below, they are all equal and determine no scale
SMALLEST_SCALE = 1e-30  # of a group of equal weights


class Moments(NamedTuple):
    """Sums over a group's columns, with weights v ≥ 0 and distances d = code - zero, for each candidate."""

    total: Float[Tensor, "#candidates *groups"]  # Σ v
    x: Float[Tensor, "#candidates *groups"]  # Σ v x
    d: Float[Tensor, "candidates *groups"]  # Σ v d
    dd: Float[Tensor, "candidates *groups"]  # Σ v d²
    dx: Float[Tensor, "candidates *groups"]  # Σ v d x


class Fit(NamedTuple):
    """Scale and zero, and by how much they lower Σ v x² - (Σ v x)² / Σ v (real zero), or Σ v x² (the others)."""

    gain: Float[Tensor, "candidates *groups"]
    scale: Float[Tensor, "candidates *groups"]
    zero: Float[Tensor, "candidates *groups"]

    def best(self) -> "Fit":
        """The candidate with the largest gain in each row."""
        most = self.gain.argmax(0, keepdim=True)
        return Fit(*(value.gather(0, most) for value in self))

    def materialize(self) -> "Fit":
        """This fit, which compiled arithmetic computes in a loop of its own."""
        return Fit(*(materialize(value) for value in self))

    def where(self, condition: Bool[Tensor, "*shape"], other: "Fit") -> "Fit":
        """This fit where the condition holds, elsewhere the other."""
        return Fit(*(torch.where(condition, here, there) for here, there in zip(self, other, strict=True)))


def clip(codes: Float[Tensor, "*shape"], top: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """Whole numbers brought into 0 … top. Compiled, this is faster than minima and maxima, which look out for NaN."""
    return top - (top - codes.relu()).relu()


def nearest_distances(
    x: Float[Tensor, "size *groups"],
    scale: Float[Tensor, "candidates *groups"],
    zero: Float[Tensor, "candidates *groups"],
    levels: Levels,
) -> Float[Tensor, "candidates size *groups"]:
    """code - zero for the code whose scale · (code - zero) is nearest to x."""
    top, inverse, highest = levels.top, materialize(1 / scale)[:, None], materialize(levels.top - zero)[:, None]
    code = (x * inverse + zero[:, None]).round()
    return highest - (top - code.relu()).relu()  # clip(code) - zero with one subtraction less


def moments(
    x: Float[Tensor, "size *groups"],
    h: Float[Tensor, "size *#groups"],
    mean: Float[Tensor, "1 *groups"],
    scale: Float[Tensor, "candidates *groups"],
    zero: Float[Tensor, "candidates *groups"],
    levels: Levels,
) -> Moments:
    """The moments of the nearest codes, weighted with h, which sums to 1; `mean` is Σ h x."""
    d = nearest_distances(x, scale, zero, levels)
    hd = h * d
    return Moments(torch.ones_like(mean), mean, hd.sum(1), (hd * d).sum(1), (hd * x).sum(1))


def fit(
    moments: Moments,
    scale: Float[Tensor, "candidates *groups"],
    zero: Float[Tensor, "candidates *groups"],
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
    peak = materialize(zero + ((dx * d - x * dd) / (dx * total - x * d)).nan_to_num(0.0, 0.0, 0.0))
    first, last = torch.zeros_like(zero), levels.top.expand_as(zero)
    best = _fit_scale(moments, first, scale, zero, levels, ridge)
    for whole in (peak.floor().clamp_min(0).minimum(last), peak.ceil().clamp_min(0).minimum(last), last):
        other = _fit_scale(moments, whole, scale, zero, levels, ridge)
        best = other.where(other.gain > best.gain, best).materialize()
    return best


def _fit_real(
    moments: Moments,
    scale: Float[Tensor, "candidates *groups"],
    zero: Float[Tensor, "candidates *groups"],
    ridge: Float[Tensor, ""] | float,
) -> Fit:
    total, x, d, dd, dx = moments
    variance, covariance = dd - d * d / total, dx - d * x / total
    valid = (variance > TINY_VARIANCE * total) & (covariance > 0)
    s = torch.where(valid, covariance / (variance + ridge * total), scale)
    z = torch.where(valid, zero + (d - x / s) / total, zero)
    return Fit(torch.where(valid, covariance * covariance / variance, 0.0), s, z)


def _fit_scale(
    moments: Moments,
    new_zero: Float[Tensor, "candidates *groups"],
    scale: Float[Tensor, "candidates *groups"],
    zero: Float[Tensor, "candidates *groups"],
    levels: Levels,
    ridge: Float[Tensor, ""] | float,
) -> Fit:
    """The best scale where the zero is `new_zero`; the moments were taken with `zero`."""
    total, x, d, dd, dx = moments
    # Σ v (d - shift)² and Σ v (d - shift) x: the moments as if they had been taken with the new zero.
    shift = new_zero - zero
    square, product = dd - 2 * shift * d + shift * shift * total, dx - shift * x
    sign = product != 0 if levels.negative_scales else product > 0
    valid = (square > TINY_VARIANCE * total) & sign
    return Fit(
        torch.where(valid, product * product / square, 0.0),
        torch.where(valid, product / (square + ridge * total), scale),
        torch.where(valid, new_zero, zero),
    )
