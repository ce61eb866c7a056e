"""Units and multiples of super-blocks under a full curvature: the best that can be stored, with codes as they are."""

import itertools

import torch
from hypothesis import given, settings
from torch import Tensor

from dashq import Full, Grid, Grouping, SuperBlocks
from dashq.solving import round_to_nearest
from dashq.solving.super_blocks import factor
from dashq.testing.examples import Problem, block_problems
from dashq_plugins.solvers.feedback.descent import descend
from dashq_plugins.solvers.feedback.joint import GroupSums, Joint, in_group_order
from dashq_plugins.solvers.feedback.units import Units
from tensors import noise

few = settings(max_examples=20)
SIGNED = Grid(
    bits=3,
    dtype=torch.float32,
    zero="symmetric",
    negative_scales=True,
    super_blocks=SuperBlocks(groups=4, size=8, top=7, signed=True),
)
UNSIGNED = Grid(bits=2, dtype=torch.float32, super_blocks=SuperBlocks(groups=4, size=8, top=7))


def joint_of(problem: Problem) -> Joint:
    w, grouping, grid = problem.weight, problem.grouping, problem.grid
    start = round_to_nearest(grouping.split(w), grid, grouping)
    return Joint.of(w, in_group_order(problem.curvature, grouping, 0.01), start)


def correlated(grid: Grid, columns: int = 64, rows: int = 6) -> Joint:
    x = noise(0, 200, columns) + 2 * noise(1, 200, 1) * torch.linspace(-1, 2, columns)
    grouping = Grouping(columns=columns, size=8)
    return joint_of(Problem(noise(2, rows, columns), Full(x.T @ x / 200), grouping, grid))


def pull(joint: Joint, part: slice) -> Tensor:
    """H t of some columns, where t is what they should have been."""
    return (joint.h @ (joint.w - joint.approximation))[part] + joint.h[part, part] @ joint.approximation[part]


@few
@given(block_problems())
def test_taken_apart_and_stored_again_nothing_changes(problem: Problem) -> None:
    joint = joint_of(problem)
    scale, offset = joint.scale.clone(), joint.offset.clone()
    units = Units.of(joint)
    for group in range(joint.grouping.groups):
        units._store(joint, slice(group, group + 1))
    assert joint.scale.equal(scale)
    assert joint.offset.equal(offset)


@few
@given(block_problems())
def test_what_the_descent_leaves_can_be_written(problem: Problem) -> None:
    joint, blocks = joint_of(problem), problem.grid.super_blocks
    assert blocks
    descend(joint, 2)
    q = joint.quantized()
    assert int(q.codes.max()) <= problem.grid.top
    for values in (q.scale,) if blocks.signed else (q.scale, -q.offset):
        parts = values.unflatten(1, (-1, blocks.groups)).flatten(0, 1)
        unit, multiple = factor(parts, blocks, blocks.signed)
        assert (unit.float() * multiple).equal(parts)
    if blocks.signed:
        assert q.offset.equal(-q.scale * problem.grid.middle)


def test_a_group_gets_the_best_of_all_pairs_of_multiples() -> None:
    for grid in (SIGNED, UNSIGNED):
        joint = correlated(grid)
        units, group = Units.of(joint), 5
        gradient = joint.h @ (joint.w - joint.approximation)
        units.fit_multiples(joint, group, GroupSums.of(joint, group, gradient[group * 8 : group * 8 + 8]))
        reached, unit, low_unit = joint.objective(), units.unit[1], units.low_unit[1]
        lows = (0,) if grid is SIGNED else range(8)
        for multiple, low in itertools.product([m for m in range(-8 if grid is SIGNED else 1, 8) if m], lows):
            joint.scale[group] = unit * multiple
            joint.offset[group] = -joint.scale[group] * (grid.middle if grid is SIGNED else 0) - low_unit * low
            assert bool((joint.objective() >= reached * (1 - 1e-5)).all())


def test_units_are_those_of_the_normal_equations() -> None:
    for grid in (SIGNED, UNSIGNED):
        joint = correlated(grid)
        units, part = Units.of(joint), slice(32, 64)
        target = torch.linalg.solve(joint.h[part, part].double(), pull(joint, part).double())
        before = joint.objective()
        units.fit_units(joint, 1, pull(joint, part))
        assert bool((joint.objective() < before).any())
        root = torch.linalg.cholesky(joint.h[part, part].double()).T
        for row in range(joint.w.shape[1]):
            multiples, lows = (values[4:8, row].repeat_interleave(8) for values in (units.multiple, units.low_multiple))
            columns = [multiples * (joint.codes[part, row] - units.middle), -lows]
            a = root @ torch.stack(columns[: 1 if grid is SIGNED else 2], 1).double()
            best = torch.linalg.lstsq(a, (root @ target[:, row])[:, None]).solution[:, 0]
            if bool((best * torch.stack([units.unit[1, row].sign(), torch.tensor(1.0)])[: len(best)] > 0).all()):
                found = torch.stack([units.unit[1, row], units.low_unit[1, row]])[: len(best)].double()
                torch.testing.assert_close(found, best, rtol=1e-3, atol=0)
