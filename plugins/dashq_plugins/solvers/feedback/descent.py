"""Descent under the full curvature: scales, offsets and codes of one group after the other, none for the worse."""

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.curvature import SMALLEST_CURVATURE
from dashq.solving import Levels, Moments, fit, store
from dashq_plugins.solvers.feedback.joint import GroupSums, Joint
from dashq_plugins.solvers.feedback.patterns import move_patterns
from dashq_plugins.solvers.feedback.successive import COLUMNS, round_in_turn
from dashq_plugins.solvers.feedback.units import Units


def descend(joint: Joint, sweeps: int) -> Float[Tensor, " rows"]:
    """Lower the objective of every row, group by group: scale and offset in closed form, then codes one by one.

    Returns the objective.

    All else fixed, the best scale and offset of a group follow from the same sums as with a diagonal curvature, taken
    with H in place of h; and the best code of a column is the one nearest to where its gradient vanishes. In
    super-blocks the units come first, then each group's multiples of them. With a codebook, levels or patterns take
    the place of codes. No step raises the objective (method: beyond the diagonal).
    """
    units = Units.of(joint) if joint.grid.super_blocks else None
    approximation = joint.approximation
    gradient = joint.h @ (joint.w - approximation)

    def take_over(groups: slice) -> None:
        """Let the approximation and the gradient follow what some groups have become."""
        part = joint.part(groups)
        values = joint.values(groups)
        gradient.addmm_(joint.h[:, part], values - approximation[part], alpha=-1)
        approximation[part] = values

    for _ in range(sweeps):
        for group in range(joint.grouping.groups):
            if units and group % units.kind.groups == 0:
                block = slice(group, group + units.kind.groups)
                part = joint.part(block)
                # H t, where t is what its columns should have been.
                pull = gradient[part] + joint.h[part, part] @ approximation[part]
                units.fit_units(joint, group // units.kind.groups, pull)
                take_over(block)
            own = slice(group, group + 1)
            sums = GroupSums.of(joint, group, gradient[joint.part(own)])
            if units:
                units.fit_multiples(joint, group, sums)
            else:
                _fit_group(joint, group, sums)
            fitted = sums.gradient_with(joint.scale[group], joint.offset[group])
            if joint.patterns:
                move_patterns(joint, group, fitted)
            else:
                _move_codes(joint, group, fitted)
            take_over(own)
    return ((joint.w - approximation) * gradient).sum(0)


def _fit_group(joint: Joint, group: int, sums: GroupSums) -> None:
    """The best stored scale and offset of one group, for its present codes."""
    scale, offset = joint.scale[group], joint.offset[group]
    moments = Moments(*(value[None] for value in sums.moments))
    best = fit(moments, scale[None], sums.zero[None], Levels.of(joint.grid, scale))
    stored_scale, _ = store(best.scale, torch.zeros_like(best.scale), joint.grid)
    stored_scale, stored_offset = store(stored_scale, -stored_scale * best.zero, joint.grid)
    new_scale, new_offset = stored_scale[0], stored_offset[0]
    better = sums.cost(new_scale, new_offset) < sums.cost(scale, offset)
    joint.scale[group] = torch.where(better, new_scale, scale)
    joint.offset[group] = torch.where(better, new_offset, offset)


def _move_codes(joint: Joint, group: int, gradient: Float[Tensor, "size rows"]) -> None:
    """One pass over a group's columns, each taking its best code given all others; changes its `gradient` in place."""
    part = joint.part(slice(group, group + 1))
    h, scale, offset, codes = joint.h[part, part], joint.scale[group], joint.offset[group], joint.codes[part]
    top, levels = Levels.of(joint.grid, scale).top, joint.levels
    # With all else fixed a column's best value is its present one plus its gradient over its curvature; rounding that
    # gives its best code. A change of it moves the best values of the columns after it in proportion to `links`.
    steps = 1 / h.diagonal().clamp_min(SMALLEST_CURVATURE)[:, None]
    links, size = steps * h, joint.grouping.size
    for start in range(0, size, COLUMNS):
        now, rest = slice(start, min(start + COLUMNS, size)), slice(start + COLUMNS, size)
        s, m = (x.expand(now.stop - start, -1) for x in (scale, offset))
        before = torch.addcmul(m, codes[now], s)
        target = torch.addcmul(before, gradient[now], steps[now])
        codes[now], moved = round_in_turn.form(joint.compiled)(target, links[now, now], s, m, top, before, levels)
        gradient[rest].addmm_(h[rest, now], moved, alpha=-1)
