"""A layer under a full curvature: what its objective takes of codes, scales and offsets, and what fills groups up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashq import Full, Grid, Grouping
from dashq.solving import round_to_nearest
from dashq.testing.examples import Problem, block_problems, grids, problems
from dashq_plugins.solvers.feedback.joint import GroupSums, Joint, in_group_order
from tensors import noise

few = settings(max_examples=30)
DAMPING = 0.01


def joint_of(problem: Problem) -> Joint:
    w, grouping, grid = problem.weight, problem.grouping, problem.grid
    h = in_group_order(problem.curvature, grouping, DAMPING)
    return Joint.of(w, h, round_to_nearest(grouping.split(w), grid, grouping))


@few
@given(problems() | block_problems())
def test_values_of_groups_are_those_of_the_whole(problem: Problem) -> None:
    joint = joint_of(problem)
    last = slice(joint.grouping.groups - 1, joint.grouping.groups)
    assert joint.approximation[joint.part(last)].equal(joint.values(last))


@few
@given(problems(columns=24, needs=Full), st.integers(1, 30))
def test_the_objective_takes_half_of_the_products(problem: Problem, stripe: int) -> None:
    joint = joint_of(problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dashq_plugins.solvers.feedback.joint.STRIPE", stripe)
        objective = joint.objective()
    error = (joint.w - joint.approximation).double()
    expected = (error * (joint.h.double() @ error)).sum(0)
    torch.testing.assert_close(objective.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1e-30))


@few
@given(problems(columns=24, needs=Full), st.floats(0.5, 2), st.floats(-1, 1))
def test_the_cost_of_a_group_is_the_objective_but_for_a_constant(problem: Problem, scale: float, offset: float) -> None:
    joint, own = joint_of(problem), slice(0, 1)
    joint.w, joint.h, joint.codes = joint.w.double(), joint.h.double(), joint.codes.double()
    joint.scale, joint.offset = joint.scale.double(), joint.offset.double()
    part = joint.part(own)
    gradient = joint.h @ (joint.w - joint.approximation)
    sums = GroupSums.of(joint, 0, gradient[part])
    before = joint.objective(), sums.cost(joint.scale[0], joint.offset[0])
    joint.scale[0], joint.offset[0] = joint.scale[0] * scale, joint.offset[0] + offset * joint.scale[0]
    after = joint.objective(), sums.cost(joint.scale[0], joint.offset[0])
    allowed = 1e-9 * (1 + float(max(value.abs().max() for value in (*before, *after))))
    torch.testing.assert_close(after[0] - before[0], after[1] - before[1], rtol=1e-6, atol=allowed)


@few
@given(problems(columns=24, needs=Full), st.floats(0.5, 2), st.floats(-1, 1))
def test_the_gradient_follows_another_scale_and_offset(problem: Problem, scale: float, offset: float) -> None:
    joint = joint_of(problem)
    for name in ("w", "h", "codes", "scale", "offset"):
        setattr(joint, name, getattr(joint, name).double())
    part = joint.part(slice(0, 1))
    sums = GroupSums.of(joint, 0, (joint.h @ (joint.w - joint.approximation))[part])
    joint.scale[0], joint.offset[0] = joint.scale[0] * scale, joint.offset[0] + offset * joint.scale[0]
    expected = (joint.h @ (joint.w - joint.approximation))[part]
    allowed = 1e-9 * (1 + float(expected.abs().max() + sums.gradient.abs().max()))
    torch.testing.assert_close(sums.gradient_with(joint.scale[0], joint.offset[0]), expected, rtol=1e-6, atol=allowed)


@few
@given(st.integers(0, 100), st.floats(0.5, 2))
def test_no_other_offset_is_better_for_a_scale(seed: int, share: float) -> None:
    x = noise(seed, 60, 24)
    grid, grouping = Grid(bits=2, dtype=torch.float32), Grouping(columns=24, size=8)
    joint = joint_of(Problem(noise(seed + 1, 5, 24), Full(x.T @ x / 60), grouping, grid))
    part = joint.part(slice(0, 1))
    sums = GroupSums.of(joint, 0, joint.h[part, part] @ (joint.w[part] - joint.approximation[part]))
    scale = share * joint.scale[0]
    best = sums.best_offset(scale)
    least = sums.cost(scale, best).double()
    for step in (-0.1, 0.1):
        there = sums.cost(scale, best + step * scale).double()
        assert bool((there >= least - 1e-5 * (least.abs() + there.abs())).all())


@few
@given(grids(), st.integers(1, 20))
def test_a_short_last_group_has_no_say_in_what_fills_it_up(grid: Grid, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(64, columns, generator=generator)
    h = in_group_order(Full(x.T @ x / 64), Grouping(columns=columns, size=8), DAMPING)
    assert len(h) == -(-columns // 8) * 8
    assert not h[columns:].any()
    assert not h[:, columns:].any()
