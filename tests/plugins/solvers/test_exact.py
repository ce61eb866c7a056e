"""`exact` reaches the global optimum of every group, as far as a file can hold it, and refuses what takes too long."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Diagonal, Grid, Grouping, PlanError
from dashq.data import Zero
from dashq.solving.arithmetic import group_importance
from dashq.solving.optimum import events, find_optimum
from dashq.testing.examples import Problem, grids, importances, problems, weights
from dashq_plugins.solvers.exact import MOST_EVENTS, ExactSolver
from recipes import REGISTRY
from tensors import noise

few = settings(max_examples=10)
SOLVER = ExactSolver()


def root_error(problem: Problem, name: str) -> Tensor:
    """The root of Σ h (w - ŵ)² of each row and group that a solver reaches, in float64."""
    q = REGISTRY.solvers[name]().solve(problem.weight, problem.curvature, problem.grouping, problem.grid)
    h = group_importance(problem.curvature, problem.grouping).double()
    return (h * problem.grouping.split(problem.weight.double() - q.dequantize().double()).square()).sum(-1).sqrt()


def optimum(problem: Problem) -> Tensor:
    """The root of the least error of each row and group, with scales and offsets of any size."""
    w, h = problem.grouping.split(problem.weight), group_importance(problem.curvature, problem.grouping)
    least = find_optimum(w.flatten(0, 1), h.repeat(len(w), 1), problem.grid).error
    return least.view(len(w), -1).sqrt()


@few
@given(weights(2, 8), importances(8), grids().filter(lambda grid: grid.bits <= 2), st.sampled_from([3, 8]))
def test_where_scales_are_not_rounded_it_is_the_optimum(w: Tensor, h: Tensor, grid: Grid, size: int) -> None:
    plain = Grid(bits=grid.bits, dtype=torch.float32, zero=grid.zero, negative_scales=grid.negative_scales)
    problem = Problem(w, Diagonal(h), Grouping(columns=8, size=size), plain)
    rounding = 4 * torch.finfo(torch.float32).eps * problem.grouping.split(w).abs().amax(-1)
    assert bool((root_error(problem, "exact") <= optimum(problem) * (1 + 1e-3) + rounding).all())


@few
@given(problems(columns=8).filter(lambda problem: problem.grid.bits <= 3))
def test_no_solver_is_better_in_any_group(problem: Problem) -> None:
    exact = root_error(problem, "exact")
    rounding = 4 * torch.finfo(torch.float32).eps * problem.grouping.split(problem.weight).abs().amax(-1)
    for other in ("rtn", "closed_form"):
        assert bool((exact <= root_error(problem, other) * (1 + 1e-4) + rounding).all())


@pytest.mark.parametrize("zero", ["real", "integer", "symmetric"])
def test_storing_its_scales_costs_next_to_nothing(zero: Zero) -> None:
    grid, grouping = Grid(bits=2, dtype=torch.float16, zero=zero), Grouping(columns=64, size=32)
    problem = Problem(noise(0, 40, 64), Diagonal(noise(1, 64).exp()), grouping, grid)
    reached, least = root_error(problem, "exact").square().sum(), optimum(problem).square().sum()
    assert 1 <= float(reached / least) < 1.001


@pytest.mark.parametrize(
    ("size", "bits", "largest"), [(128, 4, 64), (128, 5, 32), (64, 6, 16), (100, 6, 16), (4096, 8, None)]
)
def test_what_would_take_too_long_is_refused_with_the_largest_size_that_would_not(
    size: int, bits: int, largest: int | None
) -> None:
    grid = Grid(bits=bits, dtype=torch.float16)
    with pytest.raises(
        PlanError, match=re.escape(f"{events(size, grid):,} codes in each group of {size} at {bits} bits")
    ) as refusal:
        SOLVER.check(size, grid)
    if largest is not None:
        assert f"groups of up to {largest}" in str(refusal.value)
        SOLVER.check(largest, grid)
        with pytest.raises(PlanError):
            SOLVER.check(2 * largest, grid)


def test_groups_of_128_are_taken_at_2_and_3_bits() -> None:
    for bits in (2, 3):
        SOLVER.check(128, Grid(bits=bits, dtype=torch.float16))


@given(st.integers(1, 512), grids())
def test_what_it_refuses_is_just_what_visits_too_many_codes(size: int, grid: Grid) -> None:
    if events(size, grid) <= MOST_EVENTS:
        SOLVER.check(size, grid)
    else:
        with pytest.raises(PlanError):
            SOLVER.check(size, grid)
