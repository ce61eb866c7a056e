"""The contract that dashq expects of every solver, and what this one is for."""

import torch

from dashq import Diagonal, Grid, Grouping
from dashq.testing import check_strategy
from dashq_stochastic import StochasticSolver

GRID = Grid(bits=3, dtype=torch.float32)
WEIGHT = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
CURVATURE = Diagonal(torch.linspace(0.1, 2.0, 32))
GROUPING = Grouping(columns=32, size=16)


def error(**parameters: int) -> torch.Tensor:
    """The error of each weight."""
    return StochasticSolver(**parameters).solve(WEIGHT, CURVATURE, GROUPING, GRID).dequantize() - WEIGHT


def test_the_contract_is_kept() -> None:
    check_strategy(StochasticSolver)
    check_strategy(StochasticSolver(seed=1, draws=3))


def test_no_weight_is_off_on_average() -> None:
    errors = torch.stack([error(seed=seed) for seed in range(400)])
    assert errors.mean(0).abs().max() < 0.15 * errors.std(0).max()


def test_more_draws_are_never_worse_in_any_row() -> None:
    errors = [CURVATURE.row_errors(error(draws=draws)) for draws in (1, 4, 16)]
    assert bool((errors[1] <= errors[0]).all())
    assert bool((errors[2] <= errors[1]).all())
    assert bool((errors[2] < errors[0]).any())
