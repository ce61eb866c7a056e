"""A layer under a full curvature: every column's error counts together with every other's."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dashq import Codebook, Curvature, Grid, Grouping, Quantized
from dashq.curvature import SMALLEST_CURVATURE
from dashq.solving import Moments, compiling_pays

STRIPE = 256  # columns: wide enough for a fast product, narrow enough to leave out most of the lower half


@dataclass(eq=False)
class Joint:
    """Weights, codes and parameters of a layer, columns first and in the order of the groups, the last of them filled.

    The objective of a row is (w - ŵ)ᵀ H (w - ŵ). H has a mean diagonal of 1 and `damping` added to it. On a grid with
    a codebook, `codes` are their levels.
    """

    w: Float[Tensor, "filled rows"]
    h: Float[Tensor, "filled filled"]
    codes: Float[Tensor, "filled rows"]
    scale: Float[Tensor, "groups rows"]
    offset: Float[Tensor, "groups rows"]
    grouping: Grouping
    grid: Grid

    @classmethod
    def of(cls, weight: Float[Tensor, "rows columns"], h: Float[Tensor, "filled filled"], start: Quantized) -> "Joint":
        """Take up a quantized layer; `h` is in the order of the groups, as `in_group_order` gives it."""
        w = start.grouping.split(weight).flatten(1).T.contiguous()
        return cls(w, h, *_columns_first(start), start.grouping, start.grid)

    def otherwise(self, start: Quantized) -> "Joint":
        """The same weights, quantized otherwise on the same grid."""
        codes, scale, offset = _columns_first(start)
        return replace(self, codes=codes, scale=scale, offset=offset)

    @property
    def compiled(self) -> bool:
        """True where the layer has weights enough for compiled arithmetic to pay."""
        return compiling_pays(self.w.numel())

    @property
    def approximation(self) -> Float[Tensor, "filled rows"]:
        """ŵ, from the stored parameters."""
        return self.values(slice(None))

    @property
    def levels(self) -> Float[Tensor, " levels"] | None:
        """The numbers that single codes stand for where they are not evenly spaced."""
        codebook = self.grid.codebook
        return torch.tensor(codebook.levels, device=self.w.device) if codebook and codebook.is_scalar else None

    @property
    def patterns(self) -> Codebook | None:
        """The codebook where neighbouring columns are chosen together."""
        codebook = self.grid.codebook
        return None if codebook is None or codebook.is_scalar else codebook

    def values(self, groups: slice) -> Float[Tensor, "columns rows"]:
        """ŵ of some groups."""
        codes: Tensor = self.codes.unflatten(0, (-1, self.grouping.size))[groups]
        return torch.addcmul(self.offset[groups, None], codes, self.scale[groups, None]).flatten(0, 1)

    def part(self, groups: slice) -> slice:
        """The columns of some groups."""
        return slice(groups.start * self.grouping.size, groups.stop * self.grouping.size)

    def objective(self) -> Float[Tensor, " rows"]:
        """(w - ŵ)ᵀ H (w - ŵ) of each row."""
        error, total = self.w - self.approximation, torch.zeros_like(self.w[0])
        # H is symmetric: what lies above its diagonal counts twice, and what lies below it is not multiplied.
        for start in range(0, len(self.h), STRIPE):
            own, rest = slice(start, start + STRIPE), slice(start + STRIPE, None)
            products = (self.h[own, own] @ error[own]).addmm_(self.h[own, rest], error[rest], alpha=2)
            total += (error[own] * products).sum(0)
        return total

    def quantized(self) -> Quantized:
        """The layer as solvers return it."""
        rows, grouping, grid = self.w.shape[1], self.grouping, self.grid
        numbers = self.codes.T.reshape(rows, grouping.groups, grouping.size)
        codes = grid.codebook.codes(numbers) if grid.codebook else numbers.to(torch.uint8)
        return Quantized.of(codes, self.scale.T.contiguous(), self.offset.T.contiguous(), grouping, grid)


def _columns_first(
    q: Quantized,
) -> tuple[Float[Tensor, "filled rows"], Float[Tensor, "groups rows"], Float[Tensor, "groups rows"]]:
    """Numbers, scales and offsets; copies, which the descent changes in place."""
    # Of a single group the transposed offsets lie as they did.
    scale, offset = (values.T.float().clone(memory_format=torch.contiguous_format) for values in (q.scale, q.offset))
    return q.numbers(q.codes).flatten(1).T.contiguous(), scale, offset


@dataclass(frozen=True, eq=False)
class GroupSums:
    """All that a group's objective takes of its codes: ŵ = s d + (m + s zero), with d for the codes less their zero.

    `moments` are taken with H in place of h, and of t, what the group should have been. The others are of what the
    group is at present: its `scale`, `offset` and `gradient`, H (t - ŵ), and H times its codes and times ones.
    """

    zero: Float[Tensor, " rows"]
    moments: Moments
    scale: Float[Tensor, " rows"]
    offset: Float[Tensor, " rows"]
    gradient: Float[Tensor, "size rows"]
    h_codes: Float[Tensor, "size rows"]
    h_ones: Float[Tensor, "size 1"]

    @classmethod
    def of(cls, joint: Joint, group: int, gradient: Float[Tensor, "size rows"]) -> "GroupSums":
        """Those of one group, whose `gradient` is H (t - ŵ)."""
        part = joint.part(slice(group, group + 1))
        h, codes = joint.h[part, part], joint.codes[part]
        scale, offset = joint.scale[group].clone(), joint.offset[group].clone()  # the layer's own may change
        zero = -offset / scale
        h_codes, h_ones = h @ codes, h.sum(1, keepdim=True)
        d, hd = codes - zero, torch.addcmul(h_codes, h_ones, -zero)
        total = h_ones.sum().clamp_min(SMALLEST_CURVATURE).expand_as(scale)
        sd, sdd = hd.sum(0), (d * hd).sum(0)
        # H t = gradient + scale · H d
        moments = Moments(total, gradient.sum(0) + scale * sd, sd, sdd, (d * gradient).sum(0) + scale * sdd)
        return cls(zero, moments, scale, offset, gradient, h_codes, h_ones)

    def gradient_with(self, s: Float[Tensor, " rows"], m: Float[Tensor, " rows"]) -> Float[Tensor, "size rows"]:
        """H (t - ŵ) of the same codes with another scale and offset."""
        gradient = torch.addcmul(self.gradient, self.h_codes, self.scale - s)
        return gradient.addcmul_(self.h_ones, self.offset - m)

    def cost(self, s: Float[Tensor, "*many rows"], m: Float[Tensor, "*many rows"]) -> Float[Tensor, "*many rows"]:
        """ŵᵀ H ŵ - 2 ŵᵀ H t."""
        sums, shift = self.moments, m + s * self.zero
        return (
            s * s * sums.dd + 2 * s * shift * sums.d + shift * shift * sums.total - 2 * (s * sums.dx + shift * sums.x)
        )

    def best_offset(self, s: Float[Tensor, "*many rows"]) -> Float[Tensor, "*many rows"]:
        """The best offset for a scale."""
        return (self.moments.x - s * self.moments.d) / self.moments.total - s * self.zero


def in_group_order(curvature: Curvature, grouping: Grouping, damping: float) -> Float[Tensor, "filled filled"]:
    """H in the order of the groups, scaled to a mean diagonal of 1, with `damping` on the diagonal.

    A curvature without any importance is flat. Columns that fill up a group have none.
    """
    diagonal = curvature.diagonal().float()
    mean = diagonal.mean()
    if mean > 0:
        h = curvature.dense().float() / mean
        h.diagonal().add_(damping)
    else:
        h = torch.diag(torch.ones_like(diagonal))
    if grouping.order is not None:
        h = h[grouping.order][:, grouping.order]
    filling = grouping.groups * grouping.size - grouping.columns
    return torch.nn.functional.pad(h, (0, filling, 0, filling)) if filling else h


def rows_from(joint: Joint, start: Quantized, better: Bool[Tensor, " rows"]) -> Quantized:
    """The rows of the descent where those are `better`, elsewhere those of `start`."""
    now = joint.quantized()
    return replace(
        now,
        codes=torch.where(better[:, None, None], now.codes, start.codes),
        scale=torch.where(better[:, None], now.scale, start.scale),
        offset=torch.where(better[:, None], now.offset, start.offset),
    )
