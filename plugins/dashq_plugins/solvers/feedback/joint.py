"""A layer under a full curvature: every column's error counts together with every other's."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Quantized
from dashq.curvature import SMALLEST_CURVATURE
from dashq.solving import Levels, Moments, fit, pieces, store
from dashq_plugins.solvers.feedback.successive import COLUMNS, round_in_turn


@dataclass(eq=False)
class Joint:
    """Weights, codes and parameters of a layer, columns first and in the order of the groups, the last of them filled.

    The objective of a row is (w - ŵ)ᵀ H (w - ŵ). H has a mean diagonal of 1 and `damping` added to it.
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
        # Copies, which the descent changes in place: of a single group the transposed offsets lie as the start's do.
        return cls(
            w=start.grouping.split(weight).flatten(1).T.contiguous(),
            h=h,
            codes=start.codes.flatten(1).T.float().contiguous(),
            scale=start.scale.T.float().clone(memory_format=torch.contiguous_format),
            offset=start.offset.T.float().clone(memory_format=torch.contiguous_format),
            grouping=start.grouping,
            grid=start.grid,
        )

    @property
    def compiled(self) -> bool:
        """True where the layer has weights enough for compiled arithmetic to pay."""
        return self.w.numel() >= pieces.COMPILE_FROM

    @property
    def approximation(self) -> Float[Tensor, "filled rows"]:
        """ŵ, from the stored parameters."""
        size = self.grouping.size
        return self.codes * self.scale.repeat_interleave(size, 0) + self.offset.repeat_interleave(size, 0)

    def objective(self) -> Float[Tensor, " rows"]:
        """(w - ŵ)ᵀ H (w - ŵ) of each row."""
        error = self.w - self.approximation
        return (error * (self.h @ error)).sum(0)

    def quantized(self) -> Quantized:
        """The layer as solvers return it."""
        rows, grouping, grid = self.w.shape[1], self.grouping, self.grid
        codes = self.codes.T.reshape(rows, grouping.groups, grouping.size).to(torch.uint8)
        return Quantized.of(codes, self.scale.T.contiguous(), self.offset.T.contiguous(), grouping, grid)


def in_group_order(curvature: Curvature, grouping: Grouping, damping: float) -> Float[Tensor, "filled filled"]:
    """H in the order of the groups, scaled to a mean diagonal of 1, with `damping` on the diagonal.

    A curvature without any importance is flat. Columns that fill up a group have none.
    """
    diagonal = curvature.diagonal().float()
    mean = diagonal.mean()
    ones = torch.ones_like(diagonal)
    h = curvature.dense().float() / mean + torch.diag(damping * ones) if mean > 0 else torch.diag(ones)
    if grouping.order is not None:
        h = h[grouping.order][:, grouping.order]
    filling = grouping.groups * grouping.size - grouping.columns
    return torch.nn.functional.pad(h, (0, filling, 0, filling)).contiguous()


def descend(joint: Joint, sweeps: int) -> Float[Tensor, " rows"]:
    """Lower the objective of every row, group by group: scale and offset in closed form, then codes one by one.

    Returns the objective.

    All else fixed, the best scale and offset of a group follow from the same sums as with a diagonal curvature, taken
    with H in place of h; and the best code of a column is the one nearest to where its gradient vanishes. No step
    raises the objective (method: beyond the diagonal).
    """
    size = joint.grouping.size
    approximation = joint.approximation
    gradient = joint.h @ (joint.w - approximation)
    for _ in range(sweeps):
        for group in range(joint.grouping.groups):
            part = slice(group * size, (group + 1) * size)
            before = approximation[part].clone()
            pull = gradient[part] + joint.h[part, part] @ before  # H t, where t is what the group should have been
            _fit_group(joint, group, part, pull)
            approximation[part] = joint.codes[part] * joint.scale[group] + joint.offset[group]
            _move_codes(joint, group, part, approximation, pull)
            approximation[part] = joint.codes[part] * joint.scale[group] + joint.offset[group]
            gradient.addmm_(joint.h[:, part], approximation[part] - before, alpha=-1)
    return ((joint.w - approximation) * gradient).sum(0)


def _fit_group(joint: Joint, group: int, part: slice, pull: Float[Tensor, "size rows"]) -> None:
    """The best stored scale and offset of one group, for its present codes."""
    h, codes, scale, offset = joint.h[part, part], joint.codes[part], joint.scale[group], joint.offset[group]
    zero = -offset / scale
    d = codes - zero
    hd = h @ d
    total = h.sum().clamp_min(SMALLEST_CURVATURE).expand_as(scale)
    sums = Moments(total, pull.sum(0), hd.sum(0), (d * hd).sum(0), (d * pull).sum(0))
    best = fit(Moments(*(value[None] for value in sums)), scale[None], zero[None], Levels.of(joint.grid, scale))
    stored_scale, _ = store(best.scale, torch.zeros_like(best.scale), joint.grid)
    stored_scale, stored_offset = store(stored_scale, -stored_scale * best.zero, joint.grid)
    new_scale, new_offset = stored_scale[0], stored_offset[0]

    def cost(s: Float[Tensor, " rows"], m: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """ŵᵀ H ŵ - 2 ŵᵀ H t, for ŵ = s d + (m + s zero)."""
        shift = m + s * zero
        return s * s * sums.dd + 2 * s * shift * sums.d + shift * shift * total - 2 * (s * sums.dx + shift * sums.x)

    better = cost(new_scale, new_offset) < cost(scale, offset)
    joint.scale[group] = torch.where(better, new_scale, scale)
    joint.offset[group] = torch.where(better, new_offset, offset)


def _move_codes(
    joint: Joint,
    group: int,
    part: slice,
    approximation: Float[Tensor, "filled rows"],
    pull: Float[Tensor, "size rows"],
) -> None:
    """One pass over a group's columns, each taking its best code given all others."""
    h, scale, offset, codes = joint.h[part, part], joint.scale[group], joint.offset[group], joint.codes[part]
    values, top = approximation[part], Levels.of(joint.grid, scale).top
    gradient = pull - h @ values
    # With all else fixed a column's best value is its present one plus its gradient over its curvature; rounding that
    # gives its best code. A change of it moves the best values of the columns after it in proportion to `links`.
    steps = 1 / h.diagonal().clamp_min(SMALLEST_CURVATURE)[:, None]
    links, size = steps * h, joint.grouping.size
    for start in range(0, size, COLUMNS):
        now, rest = slice(start, min(start + COLUMNS, size)), slice(start + COLUMNS, size)
        before, (s, m) = values[now], (x.expand(now.stop - start, -1) for x in (scale, offset))
        target = torch.addcmul(before, gradient[now], steps[now])
        codes[now], moved = round_in_turn.form(joint.compiled)(target, links[now, now], s, m, top, before)
        gradient[rest].addmm_(h[rest, now], moved, alpha=-1)


def rows_from(joint: Joint, start: Quantized, better: Bool[Tensor, " rows"]) -> Quantized:
    """The rows of the descent where those are `better`, elsewhere those of `start`."""
    now = joint.quantized()
    return replace(
        now,
        codes=torch.where(better[:, None, None], now.codes, start.codes),
        scale=torch.where(better[:, None], now.scale, start.scale),
        offset=torch.where(better[:, None], now.offset, start.offset),
    )
