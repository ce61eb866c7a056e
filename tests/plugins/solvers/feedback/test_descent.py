"""Descent under a full curvature: no step raises the objective, and tiny problems are solved."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Curvature, Full, Grid, Grouping, Quantized
from dashq.solving.arithmetic import round_to_nearest
from dashq.testing.examples import Problem, block_problems, problems
from dashq_plugins.solvers.feedback.descent import descend
from dashq_plugins.solvers.feedback.joint import Joint, in_group_order
from recipes import REGISTRY

few = settings(max_examples=30)
DAMPING = 0.01


def joint_of(problem: Problem, start: Quantized | None = None) -> Joint:
    w, grouping, grid = problem.weight, problem.grouping, problem.grid
    start = start or round_to_nearest(grouping.split(w), grid, grouping)
    return Joint.of(w, in_group_order(problem.curvature, grouping, DAMPING), start)


def slack(joint: Joint) -> Tensor:
    """What float32 cannot tell apart."""
    return 1e-4 * joint.objective() + 1e-6 * (joint.w.square().sum(0) * joint.h.diagonal().max())


@few
@given(problems() | block_problems(), st.integers(1, 3))
def test_no_sweep_raises_the_objective(problem: Problem, sweeps: int) -> None:
    joint = joint_of(problem)
    before, allowed = joint.objective(), slack(joint)
    descend(joint, sweeps)
    assert (joint.objective() <= before + allowed).all()


@few
@given(problems())
def test_what_descent_chooses_is_on_the_grid(problem: Problem) -> None:
    joint = joint_of(problem)
    descend(joint, 2)
    grid, result = problem.grid, joint.quantized()
    assert result.codes.max() <= grid.top
    assert result.scale.float().equal(joint.scale.T)  # stored without rounding
    assert result.offset.float().equal(joint.offset.T)
    if grid.zero == "integer":
        assert (result.zeros >= 0).all()
        assert (result.zeros <= grid.top).all()


@few
@given(problems())
def test_columns_may_come_in_any_order(problem: Problem) -> None:
    columns = problem.weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    there = Grouping(columns=columns, size=problem.grouping.size, order=order)
    moved = Problem(
        problem.weight[:, order],
        _reordered(problem.curvature, order),
        Grouping(columns=columns, size=problem.grouping.size),
        problem.grid,
    )
    one, other = joint_of(Problem(problem.weight, problem.curvature, there, problem.grid)), joint_of(moved)
    for joint in (one, other):
        descend(joint, 1)
    torch.testing.assert_close(one.objective(), other.objective(), rtol=1e-3, atol=float(slack(one).max()))


def _reordered(curvature: Curvature, order: Tensor) -> Curvature:
    return Full(curvature.dense()[order][:, order])


def test_descent_from_every_start_contains_the_best_codes_of_a_tiny_problem() -> None:
    generator = torch.Generator().manual_seed(1)
    w, x = torch.randn(1, 4, generator=generator), torch.randn(9, 4, generator=generator)
    grid, grouping = Grid(bits=1, dtype=torch.float32), Grouping(columns=4, size=4)
    problem = Problem(w, Full(x.T @ x / 9), grouping, grid)
    minmax = round_to_nearest(grouping.split(w), grid, grouping)
    reached = []
    for codes in itertools.product((0, 1), repeat=4):
        joint = joint_of(problem, minmax)
        joint.codes = torch.tensor(codes).float()[:, None]
        descend(joint, 20)
        reached.append(float(joint.objective()))
    least = min(
        _least(w[0].double(), joint_of(problem).h.double(), codes) for codes in itertools.product((0, 1), repeat=4)
    )
    assert min(reached) == pytest.approx(least, rel=1e-4)


def _least(w: Tensor, h: Tensor, codes: tuple[int, ...]) -> float:
    """The least squares over scale and offset for given codes, by solving the normal equations."""
    a = torch.stack([torch.tensor(codes).double(), torch.ones(4).double()], 1)
    if len(set(codes)) == 1:
        a = a[:, 1:]
    theta = torch.linalg.solve(a.T @ h @ a, a.T @ h @ w)
    error = w - a @ theta
    return float(error @ h @ error)


@few
@given(problems(columns=8, needs=Full))
def test_the_descent_leaves_the_layer_that_it_starts_from_as_it_is(problem: Problem) -> None:
    grouping = Grouping(columns=8, size=8)
    start = REGISTRY.solvers["closed_form"]().solve(problem.weight, problem.curvature, grouping, problem.grid)
    offset = start.offset.clone()
    descend(Joint.of(problem.weight, in_group_order(problem.curvature, grouping, DAMPING), start), 1)
    assert start.offset.equal(offset)
