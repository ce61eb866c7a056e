"""Scales and offsets of super-blocks under a full curvature: the units, and each group's whole multiples of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dashq import SuperBlocks
from dashq.solving import as_unit, factor
from dashq_plugins.solvers.feedback.joint import GroupSums, Joint


@dataclass(eq=False)
class Units:
    """A layer's scales, unit · multiple, and offsets, -scale · middle - low_unit · low_multiple; columns first.

    The middle is 0 where groups have offsets of their own, and where they have none there are no lows.
    """

    unit: Float[Tensor, "blocks rows"]
    multiple: Float[Tensor, "groups rows"]
    low_unit: Float[Tensor, "blocks rows"]
    low_multiple: Float[Tensor, "groups rows"]
    kind: SuperBlocks
    middle: int

    @classmethod
    def of(cls, joint: Joint) -> "Units":
        """Take the scales and offsets of a layer apart."""
        kind = joint.grid.super_blocks
        assert kind
        unit, multiple = _factors(joint.scale, kind, kind.signed)
        if kind.has_offsets:
            low_unit, low_multiple = _factors(-joint.offset, kind)
        else:
            low_unit, low_multiple = torch.ones_like(unit), torch.zeros_like(multiple)
        return cls(unit, multiple, low_unit, low_multiple, kind, 0 if kind.has_offsets else joint.grid.middle)

    def fit_units(self, joint: Joint, block: int, pull: Float[Tensor, "columns rows"]) -> None:
        """The best units of one super-block as float16 holds them, for its present codes and multiples.

        `pull` is H t of its columns, where t is what they should have been. ŵ = unit · a + low_unit · b solves normal
        equations of 2 × 2 in each row.
        """
        groups = slice(block * self.kind.groups, (block + 1) * self.kind.groups)
        size = self.kind.size
        part = slice(groups.start * size, groups.stop * size)
        h = joint.h[part, part]
        a = self.multiple[groups].repeat_interleave(size, 0) * (joint.codes[part] - self.middle)
        b = -self.low_multiple[groups].repeat_interleave(size, 0)
        ha = h @ a
        aa, ab, ax = (a * ha).sum(0), (b * ha).sum(0), (a * pull).sum(0)
        bb, bx = (b * (h @ b)).sum(0), (b * pull).sum(0)
        unit, low_unit = self.unit[block], self.low_unit[block]

        def cost(u: Float[Tensor, " rows"], v: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
            """ŵᵀ H ŵ - 2 ŵᵀ H t."""
            return u * u * aa + 2 * u * v * ab + v * v * bb - 2 * (u * ax + v * bx)

        determinant = aa * bb - ab * ab
        both = (bb * ax - ab * bx) / determinant, (aa * bx - ab * ax) / determinant
        first = (ax - low_unit * ab) / aa, low_unit
        second = unit, (bx - unit * ab) / bb
        for new_unit, new_low in (both, first, second):
            # Units of another sign, or none, would turn multiples around that have one sign alone.
            allowed = (new_unit * unit > 0) & (new_low > 0)
            u, v = (as_unit(torch.where(allowed, new, old)) for new, old in ((new_unit, unit), (new_low, low_unit)))
            better = cost(u, v) < cost(self.unit[block], self.low_unit[block])
            self.unit[block] = torch.where(better, u, self.unit[block])
            self.low_unit[block] = torch.where(better, v, self.low_unit[block])
        self._store(joint, groups)

    def fit_multiples(self, joint: Joint, group: int, sums: GroupSums) -> None:
        """The best two multiples of one group for its present codes, out of all that there are."""
        block = group // self.kind.groups
        unit, low_unit = self.unit[block], self.low_unit[block]
        multiples = self.kind.multiples.to(unit)[:, None]
        scales = multiples * unit
        if self.kind.has_offsets:
            # For each scale the best offset follows, and the nearest whole multiple is the best that can be stored.
            lows = (-sums.best_offset(scales) / low_unit).round().clamp(0, self.kind.top)
        else:
            lows = torch.zeros_like(scales)
        offsets = -scales * self.middle - low_unit * lows
        costs = sums.cost(scales, offsets)
        best = costs.argmin(0, keepdim=True)
        better = costs.gather(0, best)[0] < sums.cost(joint.scale[group], joint.offset[group])
        self.multiple[group] = torch.where(better, multiples[best[0], 0], self.multiple[group])
        self.low_multiple[group] = torch.where(better, lows.gather(0, best)[0], self.low_multiple[group])
        self._store(joint, slice(group, group + 1))

    def _store(self, joint: Joint, groups: slice) -> None:
        """Let the layer have the scales and offsets of some groups."""
        block = torch.arange(groups.start, groups.stop, device=self.unit.device) // self.kind.groups
        joint.scale[groups] = self.unit[block] * self.multiple[groups]
        lows = self.low_unit[block] * self.low_multiple[groups]
        joint.offset[groups] = -joint.scale[groups] * self.middle - lows


def _factors(
    values: Float[Tensor, "groups rows"], kind: SuperBlocks, signed: bool = False
) -> tuple[Float[Tensor, "blocks rows"], Float[Tensor, "groups rows"]]:
    unit, multiple = factor(values.T.reshape(-1, kind.groups), kind, signed)
    rows = values.shape[1]
    return unit.float().reshape(rows, -1).T.contiguous(), multiple.float().reshape(rows, -1).T.contiguous()
