"""`irls` descends from round to round, and nothing degenerate upsets it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from dashq import Diagonal, Grid, Grouping, Quantized
from dashq.solving import pieces
from dashq.solving.alternation import RESIDUAL_FLOOR
from dashq.solving.arithmetic import group_importance, round_to_nearest
from dashq.testing.examples import grids, importances, weights
from dashq_plugins.solvers.irls import IrlsSolver
from tensors import noise

ROWS = 3
SIZE = 12
GROUPING = Grouping(columns=SIZE, size=SIZE)
ONES = torch.ones(SIZE)
ANY_WEIGHTS = weights(ROWS, SIZE)
ANY_IMPORTANCES = importances(SIZE)
BITS = st.integers(1, 4)
SEEDS = st.integers(0, 999)


few = settings(max_examples=25)


def solve(w: Tensor, h: Tensor, grid: Grid, size: int = SIZE, **parameters: Any) -> Quantized:
    grouping = Grouping(columns=w.shape[1], size=size)
    return IrlsSolver(**parameters).solve(w, Diagonal(h), grouping, grid)


def exact(bits: int) -> Grid:
    """A grid in which scales and offsets are not rounded."""
    return Grid(bits=bits, dtype=torch.float32)


def root_error(w: Tensor, h: Tensor, q: Quantized) -> Tensor:
    """The root of Σ h (w - ŵ)² in each row and group."""
    shares = group_importance(Diagonal(h), q.grouping).double()
    return (shares * q.grouping.split(w.double() - q.dequantize().double()).square()).sum(-1).sqrt()


@few
@given(ANY_WEIGHTS, ANY_IMPORTANCES, BITS, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_no_other_code_is_nearer_to_a_weight(w: Tensor, h: Tensor, bits: int, dtype: torch.dtype) -> None:
    grid = Grid(bits=bits, dtype=dtype)
    q = solve(w, h, grid)
    every = q.scale.double() * torch.arange(grid.top + 1) + q.offset.double()  # [rows, codes]
    nearest = (w.double()[..., None] - every[:, None]).abs().amin(-1)
    reached = (w.double() - q.dequantize().double()).abs()
    assert (reached <= nearest + 1e-6 * (w.abs() + 1e-6)).all()


@few
@given(ANY_WEIGHTS, ANY_IMPORTANCES, BITS, st.sampled_from([0.0, 0.5]))
def test_every_iteration_descends(w: Tensor, h: Tensor, bits: int, damping: float) -> None:
    errors = [root_error(w, h, solve(w, h, exact(bits), iterations=n, damping=damping)) for n in range(8)]
    rounding = 1e-6 * w.abs().amax(-1, keepdim=True)
    assert all((later <= earlier * (1 + 1e-5) + rounding).all() for earlier, later in pairwise(errors))


@few
@given(ANY_WEIGHTS, ANY_IMPORTANCES, grids(), st.floats(0.5, 2))
def test_no_norm_is_better_served_by_squares_and_none_loses_to_min_max_rounding(
    w: Tensor, h: Tensor, grid: Grid, p: float
) -> None:
    squares, robust = (solve(w, h, grid, p=norm) for norm in (2.0, p))
    minmax = round_to_nearest(GROUPING.split(w), grid, GROUPING)
    floor = (RESIDUAL_FLOOR * minmax.scale.double()).square()
    shares = group_importance(Diagonal(h), GROUPING).double()[0]

    def own(q: Quantized) -> Tensor:
        return ((w.double() - q.dequantize().double()).square() + floor) ** (p / 2) @ shares

    indistinguishable = 4 * torch.finfo(torch.float32).eps * w.abs().amax(1).double()
    assert bool((own(robust) <= own(squares) * (1 + 1e-3) + (1000 * indistinguishable) ** p).all())
    lost = root_error(w, h, robust) - root_error(w, h, minmax) * (1 + 1e-4)
    assert bool((lost <= indistinguishable[:, None]).all())


def test_it_tells_how_many_iterations_moved_a_group() -> None:
    w, h = noise(0, 64, 32), torch.ones(32)
    few_rounds = solve(w, h, exact(2), 32, iterations=2).statistics
    assert (few_rounds["iterations_max"], few_rounds["at_rest"] < 0.5) == (2, True)
    many = solve(w, h, exact(2), 32, iterations=50, tolerance=1e-5).statistics
    assert many["at_rest"] == 1
    assert few_rounds["iterations_mean"] < many["iterations_mean"] < many["iterations_max"] < 50
    assert solve(w, h, exact(2), 32, iterations=50, tolerance=0.1).statistics["iterations_max"] < many["iterations_max"]


def test_what_is_at_rest_changes_no_more() -> None:
    w, h = noise(0, 64, 32), noise(1, 32).exp()
    rested = solve(w, h, exact(2), 32, iterations=60, tolerance=1e-5)
    torch.testing.assert_close(solve(w, h, exact(2), 32, iterations=120).dequantize(), rested.dequantize())


def test_a_robust_norm_trades_squared_for_absolute_error() -> None:
    w, h = noise(0, 256, 64), torch.ones(64)
    squares, robust = ((w - solve(w, h, exact(2), 64, p=p, iterations=60).dequantize()).abs() for p in (2.0, 1.0))
    assert robust.mean() < squares.mean()
    assert robust.square().mean() > squares.square().mean()


@few
@given(ANY_WEIGHTS, ANY_IMPORTANCES, grids(), st.integers(-20, 20))
def test_only_proportions_of_importance_count(w: Tensor, h: Tensor, grid: Grid, power: int) -> None:
    assert solve(w, h * 2.0**power, grid).dequantize().equal(solve(w, h, grid).dequantize())


@few
@given(ANY_WEIGHTS, ANY_IMPORTANCES, BITS, st.integers(-20, 20))
def test_weights_of_another_scale_give_the_same_codes(w: Tensor, h: Tensor, bits: int, power: int) -> None:
    factor = 2.0**power
    assert solve(w * factor, h, exact(bits)).dequantize().equal(solve(w, h, exact(bits)).dequantize() * factor)


@few
@given(SEEDS, ANY_IMPORTANCES, BITS, st.floats(-2, 2))
def test_neither_a_shift_nor_the_order_of_columns_matters(seed: int, h: Tensor, bits: int, shift: float) -> None:
    w, order = noise(seed, ROWS, SIZE), torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))
    here, there = solve(w, h, exact(bits)), solve((w + shift)[:, order], h[order], exact(bits))
    torch.testing.assert_close(
        root_error(w, h, here), root_error((w + shift)[:, order], h[order], there), rtol=1e-3, atol=1e-5
    )


@few
@given(SEEDS, ANY_IMPORTANCES, grids(("real",)), st.sampled_from([1, SIZE]))
def test_a_constant_group_is_reproduced(seed: int, h: Tensor, grid: Grid, size: int) -> None:
    w = noise(seed, ROWS, 1).to(grid.dtype).float().expand(ROWS, SIZE)
    assert solve(w, h, grid, size).dequantize().equal(w)


@few
@given(SEEDS, grids(("real",)))
def test_a_group_of_one_column_is_reproduced(seed: int, grid: Grid) -> None:
    w = noise(seed, ROWS, SIZE).to(grid.dtype).float()
    assert solve(w, ONES, grid, size=1).dequantize().equal(w)


@few
@given(ANY_WEIGHTS, grids())
def test_no_importance_at_all_is_as_good_as_flat(w: Tensor, grid: Grid) -> None:
    assert solve(w, torch.zeros(SIZE), grid).dequantize().equal(solve(w, ONES, grid).dequantize())


@few
@given(SEEDS, BITS, st.integers(0, SIZE - 1))
def test_a_column_of_all_importance_is_met_closely(seed: int, bits: int, column: int) -> None:
    w, h = noise(seed, ROWS, SIZE), torch.where(torch.arange(SIZE) == column, 1e6, 1.0)
    q = solve(w, h, exact(bits))
    assert ((w - q.dequantize())[:, column].abs() < 0.02 * q.scale[:, 0]).all()


def test_a_huge_offset_costs_nothing() -> None:
    far = 1000 + noise(0, 64, 32)
    near, h = far - 1000, torch.ones(32)
    there, here = (root_error(w, h, solve(w, h, exact(2), 32)).mean() for w in (far, near))
    torch.testing.assert_close(there, here, rtol=1e-2, atol=0)


def test_rows_do_not_depend_on_the_block_they_are_solved_in(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = noise(0, 7, 32), noise(1, 32).exp()
    together = solve(w, h, exact(2), 8)
    monkeypatch.setitem(pieces.WEIGHTS, "eager", 16)
    torch.testing.assert_close(solve(w, h, exact(2), 8).dequantize(), together.dequantize())


def test_the_preset_paper_fills_in_what_is_not_said() -> None:
    paper = {"iterations": 9, "damping": 0.5, "ridge": 0.01, "p": 2.0, "tolerance": 0.0}
    assert IrlsSolver(preset="paper").model_dump() == {"name": "irls", "preset": "paper", **paper}
    changed = IrlsSolver(preset="paper", iterations=3, ridge=0)
    assert (changed.iterations, changed.ridge, changed.damping) == (3, 0, 0.5)
    assert IrlsSolver().damping == 0


@pytest.mark.parametrize("field", [{"damping": 1.0}, {"iterations": -1}, {"ridge": -0.1}, {"p": 2.1}, {"p": 0.4}])
def test_parameters_outside_their_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(field))):
        IrlsSolver.model_validate(field)
