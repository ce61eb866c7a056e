"""Descent and error feedback under a full curvature: no step raises the objective, and tiny problems are solved."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Curvature, Diagonal, Full, Grid, Grouping, Quantized
from dashq.solving.arithmetic import round_to_nearest
from dashq.testing.examples import Problem, curvatures, grids, problems
from dashq_plugins.solvers.feedback.error_feedback import factorize, feed_back
from dashq_plugins.solvers.feedback.joint import Joint, descend, in_group_order
from recipes import REGISTRY
from tensors import noise

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
@given(problems(), st.integers(1, 3))
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


@few
@given(problems(columns=12), st.integers(0, 99))
def test_under_a_diagonal_feedback_is_rounding(problem: Problem, seed: int) -> None:
    h = torch.rand(12, generator=torch.Generator().manual_seed(seed)) + 0.1
    joint = joint_of(Problem(problem.weight, Diagonal(h), problem.grouping, problem.grid))
    before = joint.codes.clone()
    assert feed_back(joint, 0.0) == 0.0
    assert joint.codes.equal(before)


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
@given(problems(needs=Full))
def test_feedback_never_loses_to_the_best_under_the_diagonal(problem: Problem) -> None:
    closed_form, feedback = (
        REGISTRY.solvers[name]().solve(problem.weight, problem.curvature, problem.grouping, problem.grid)
        for name in ("closed_form", "feedback")
    )
    before, after = (joint_of(problem, result) for result in (closed_form, feedback))
    assert (after.objective() <= before.objective() + slack(before)).all()


@few
@given(curvatures(16, Full))
def test_any_curvature_is_factorized_with_enough_damping(curvature: Curvature) -> None:
    h = in_group_order(curvature, Grouping(columns=16, size=16), 0.0)
    factors = factorize(h, 0.0)
    assert factors is not None
    upper, damping = factors
    inverse = torch.linalg.inv((h + damping * torch.eye(16)).double())
    torch.testing.assert_close((upper.T @ upper).double(), inverse, rtol=1e-2, atol=1e-2 * float(inverse.abs().max()))


def test_what_cannot_be_factorized_keeps_its_codes_and_says_so() -> None:
    w = noise(0, 2, 8)
    indefinite = 3 * torch.ones(8, 8) - 2 * torch.eye(8)
    grid = Grid(bits=2, dtype=torch.float32)
    joint = joint_of(Problem(w, Full(indefinite), Grouping(columns=8, size=8), grid))
    before = joint.codes.clone()
    assert feed_back(joint, 0.0) is None
    assert joint.codes.equal(before)


@few
@given(grids(), st.integers(1, 20))
def test_a_short_last_group_has_no_say_in_what_fills_it_up(grid: Grid, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(64, columns, generator=generator)
    h = in_group_order(Full(x.T @ x / 64), Grouping(columns=columns, size=8), DAMPING)
    assert len(h) == -(-columns // 8) * 8
    assert not h[columns:].any()
    assert not h[:, columns:].any()


@few
@given(problems(columns=8, needs=Full))
def test_the_descent_leaves_the_layer_that_it_starts_from_as_it_is(problem: Problem) -> None:
    grouping = Grouping(columns=8, size=8)
    start = REGISTRY.solvers["closed_form"]().solve(problem.weight, problem.curvature, grouping, problem.grid)
    offset = start.offset.clone()
    descend(Joint.of(problem.weight, in_group_order(problem.curvature, grouping, DAMPING), start), 1)
    assert start.offset.equal(offset)
