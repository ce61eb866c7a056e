"""The half-steps of `irls` are optimal, the whole descends, and nothing degenerate upsets it."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from dashq import Diagonal, Grid, Grouping, Quantized
from dashq.data import Zero
from dashq.solving import pieces
from dashq.solving.alternation import RESIDUAL_FLOOR, alternate
from dashq.solving.arithmetic import group_importance, round_to_nearest
from dashq.solving.least_squares import Fit, Moments, fit
from dashq.solving.pieces import Piece
from dashq.solving.stored_values import Levels
from dashq.testing.examples import grids, importances, weights
from dashq_plugins.solvers.irls import IrlsSolver

ROWS, SIZE = 3, 12
GROUPING = Grouping(columns=SIZE, size=SIZE)
ONES = torch.ones(SIZE)
ANY_WEIGHTS, ANY_IMPORTANCES = weights(ROWS, SIZE), importances(SIZE)
BITS = st.integers(1, 4)
SEEDS = st.integers(0, 999)
few = settings(max_examples=25)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


Example = tuple[Tensor, Tensor, Tensor]


@st.composite
def fits(draw: st.DrawFn) -> Example:
    """Weights and codes that more or less follow them, both [1, SIZE], and importances that sum to 1, in float64."""
    w, h = draw(weights(1, SIZE)).double(), draw(ANY_IMPORTANCES)
    around = 1.5 + (w - w.mean()) / w.std().clamp_min(1e-12) + 0.3 * normal(draw(SEEDS), SIZE)
    v = group_importance(Diagonal(h), GROUPING).double()
    return w, around.round().clamp(0, 3), v[0] / v.sum()


def fitted(example: Example, zero: Zero = "real", ridge: float = 0.0, negative_scales: bool = False) -> Fit:
    """The fit to given codes, of examples only in which they determine a scale."""
    w, q, v = example
    start = torch.full_like(w[:, :1], 2.0)
    d = q - start
    sums = [(v * term).sum(1, keepdim=True) for term in (torch.ones_like(w), w, d, d * d, d * w)]
    grid = Grid(bits=2, dtype=torch.float32, zero=zero, negative_scales=negative_scales)
    found = fit(Moments(*sums), torch.full_like(start, 12345.0), start, Levels.of(grid, w), ridge)
    assume(found.scale.item() != 12345.0)
    return found


def left(example: Example, scale: float | Tensor, zero: float | Tensor) -> Tensor:
    """Σ v (w - scale · (code - zero))²."""
    w, q, v = example
    return (v * (w - scale * (q - zero)).square()).sum()


@given(fits())
def test_scale_and_zero_are_those_of_least_squares(example: Example) -> None:
    w, q, v = example
    _, s, z = fitted(example)
    root, columns = v.sqrt().numpy(), np.stack([q.numpy()[0], np.ones(SIZE)], axis=1)
    expected = np.linalg.lstsq(columns * root[:, None], w.numpy()[0] * root, rcond=None)[0]
    np.testing.assert_allclose([s.item(), (-s * z).item()], expected, rtol=1e-7, atol=1e-10)


@given(fits(), st.sampled_from([0.0, 0.01, 1.0]))
def test_the_gradient_vanishes_with_a_ridge_on_the_scale(example: Example, ridge: float) -> None:
    w, q, v = example
    _, scale, zero = fitted(example, ridge=ridge)
    s, m = (value.clone().requires_grad_() for value in (scale, -scale * zero))
    objective = (v * (w - s * q - m).square()).sum() + ridge * s.square().sum()
    for gradient in torch.autograd.grad(objective, (s, m)):
        assert gradient.abs().item() < 1e-9 * (1 + w.abs().max().item())


@given(fits(), st.sampled_from([0.0, 0.01, 1.0]), st.booleans())
def test_with_a_fixed_zero_the_gradient_of_the_scale_vanishes(example: Example, ridge: float, negative: bool) -> None:
    _, scale, zero = fitted(example, "symmetric", ridge, negative)
    assert zero.item() == 2
    s = scale.clone().requires_grad_()
    gradient = torch.autograd.grad(left(example, s, zero) + ridge * s.square().sum(), s)[0]
    assert gradient.abs().item() < 1e-9 * (1 + example[0].abs().max().item())


@given(fits())
def test_no_whole_zero_is_better_than_the_one_that_is_chosen(example: Example) -> None:
    w, q, v = example
    gain, scale, zero = fitted(example, "integer")
    assert zero.item() in range(4)
    total = (v * w * w).sum()
    torch.testing.assert_close(left(example, scale, zero), total - gain.squeeze(), rtol=1e-9, atol=1e-9)
    for other in range(4):
        square, product = (v * (q - other) ** 2).sum(), (v * w * (q - other)).sum()
        if square > 1e-6 and product > 0:
            assert gain.item() >= (product * product / square).item() * (1 - 1e-9)


@given(fits(), st.floats(-100, 100), st.floats(0.01, 100), SEEDS)
def test_a_fit_follows_shift_and_scale_and_ignores_the_order(
    example: Example, shift: float, factor: float, seed: int
) -> None:
    w, q, v = example
    _, s, z = fitted(example)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))
    _, moved, zero = fitted(((factor * w + shift)[:, order], q[:, order], v[order]))
    torch.testing.assert_close(moved, factor * s, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(-moved * zero, -factor * s * z + shift, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("codes", [[2.0] * SIZE, [float(j < SIZE // 2) for j in range(SIZE)]], ids=["equal", "falling"])
@pytest.mark.parametrize("zero", ["real", "symmetric"])
def test_codes_that_give_no_positive_scale_leave_scale_and_zero_alone(codes: list[float], zero: Zero) -> None:
    x = torch.arange(SIZE).double()[None] - (SIZE - 1) / 2
    d = torch.tensor(codes, dtype=torch.float64)[None] - 2.0
    sums = [term.mean(1, keepdim=True) for term in (torch.ones_like(x), x, d, d * d, d * x)]
    levels = Levels.of(Grid(bits=2, dtype=torch.float32, zero=zero), x)
    found = fit(Moments(*sums), torch.full_like(sums[0], 0.5), torch.full_like(sums[0], 2.0), levels)
    assert (found.gain.item(), found.scale.item(), found.zero.item()) == (0.0, 0.5, 2.0)


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
@given(ANY_WEIGHTS, ANY_IMPORTANCES, grids(), st.sampled_from([0.5, 1.0, 1.5, 2.0]))
def test_the_alternation_descends_in_its_own_objective(w: Tensor, h: Tensor, grid: Grid, p: float) -> None:
    shares = group_importance(Diagonal(h), GROUPING).T[..., None].double()
    piece = Piece(w.T[:, None].double(), shares, replace(grid, dtype=torch.float32))
    start = torch.full((1, 1, ROWS), 0.5 * float(w.std(1).mean()) + 1e-6, dtype=torch.float64)
    middle, x = torch.full_like(start, float(grid.middle)), piece.w - piece.origin
    floor = (RESIDUAL_FLOOR * start).square() if p < 2 else torch.zeros_like(start)

    def objective(rounds: int) -> Tensor:
        s, z, _ = alternate(piece, start, middle, rounds, p=p)
        d = (x / s + z).round().clamp(0, grid.top) - z
        return (piece.h * ((x - s * d).square() + floor) ** (p / 2)).sum(0)

    objectives = [objective(rounds) for rounds in range(6)]
    slack = 1e-9 * (piece.h * (x.square() + floor) ** (p / 2)).sum(0)
    assert all((later <= earlier + slack).all() for earlier, later in pairwise(objectives))


@pytest.mark.parametrize("p", [1.0, 1.5])
def test_a_robust_norm_reaches_less_of_itself_than_squares_do(p: float) -> None:
    w = normal(0, 256, 64)
    w[:, ::16] *= 6  # outliers
    piece = Piece(w.T[:, None].double(), torch.full((64, 1, 1), 1 / 64, dtype=torch.float64), exact(3))
    x = piece.w - piece.origin
    start = piece.minmax[0].double(), piece.zero(*piece.minmax).double()
    floor = (RESIDUAL_FLOOR * start[0]).square()

    def objective(norm: float) -> float:
        s, z, _ = alternate(piece, *start, 30, p=norm)
        d = (x / s + z).round().clamp(0, 7) - z
        return float((((x - s * d).square() + floor) ** (p / 2)).mean())

    assert objective(p) < objective(2.0)


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
    w, h = normal(0, 64, 32), torch.ones(32)
    few_rounds = solve(w, h, exact(2), 32, iterations=2).statistics
    assert (few_rounds["iterations_max"], few_rounds["at_rest"] < 0.5) == (2, True)
    many = solve(w, h, exact(2), 32, iterations=50, tolerance=1e-5).statistics
    assert many["at_rest"] == 1
    assert few_rounds["iterations_mean"] < many["iterations_mean"] < many["iterations_max"] < 50
    assert solve(w, h, exact(2), 32, iterations=50, tolerance=0.1).statistics["iterations_max"] < many["iterations_max"]


def test_what_is_at_rest_changes_no_more() -> None:
    w, h = normal(0, 64, 32), normal(1, 32).exp()
    rested = solve(w, h, exact(2), 32, iterations=60, tolerance=1e-5)
    torch.testing.assert_close(solve(w, h, exact(2), 32, iterations=120).dequantize(), rested.dequantize())


def test_a_robust_norm_trades_squared_for_absolute_error() -> None:
    w, h = normal(0, 256, 64), torch.ones(64)
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
    w, order = normal(seed, ROWS, SIZE), torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))
    here, there = solve(w, h, exact(bits)), solve((w + shift)[:, order], h[order], exact(bits))
    torch.testing.assert_close(
        root_error(w, h, here), root_error((w + shift)[:, order], h[order], there), rtol=1e-3, atol=1e-5
    )


@few
@given(SEEDS, ANY_IMPORTANCES, grids(("real",)), st.sampled_from([1, SIZE]))
def test_a_constant_group_is_reproduced(seed: int, h: Tensor, grid: Grid, size: int) -> None:
    w = normal(seed, ROWS, 1).to(grid.dtype).float().expand(ROWS, SIZE)
    assert solve(w, h, grid, size).dequantize().equal(w)


@few
@given(SEEDS, grids(("real",)))
def test_a_group_of_one_column_is_reproduced(seed: int, grid: Grid) -> None:
    w = normal(seed, ROWS, SIZE).to(grid.dtype).float()
    assert solve(w, ONES, grid, size=1).dequantize().equal(w)


@few
@given(ANY_WEIGHTS, grids())
def test_no_importance_at_all_is_as_good_as_flat(w: Tensor, grid: Grid) -> None:
    assert solve(w, torch.zeros(SIZE), grid).dequantize().equal(solve(w, ONES, grid).dequantize())


@few
@given(SEEDS, BITS, st.integers(0, SIZE - 1))
def test_a_column_of_all_importance_is_met_closely(seed: int, bits: int, column: int) -> None:
    w, h = normal(seed, ROWS, SIZE), torch.where(torch.arange(SIZE) == column, 1e6, 1.0)
    q = solve(w, h, exact(bits))
    assert ((w - q.dequantize())[:, column].abs() < 0.02 * q.scale[:, 0]).all()


def test_a_huge_offset_costs_nothing() -> None:
    far = 1000 + normal(0, 64, 32)
    near, h = far - 1000, torch.ones(32)
    there, here = (root_error(w, h, solve(w, h, exact(2), 32)).mean() for w in (far, near))
    torch.testing.assert_close(there, here, rtol=1e-2, atol=0)


def test_rows_do_not_depend_on_the_block_they_are_solved_in(monkeypatch: pytest.MonkeyPatch) -> None:
    w, h = normal(0, 7, 32), normal(1, 32).exp()
    together = solve(w, h, exact(2), 8)
    monkeypatch.setitem(pieces.WEIGHTS, "eager", 16)
    torch.testing.assert_close(solve(w, h, exact(2), 8).dequantize(), together.dequantize())


def test_the_preset_paper_fills_in_what_is_not_said() -> None:
    paper = {"iterations": 9, "damping": 0.5, "ridge": 0.01, "p": 2.0, "tolerance": 0.0}
    assert IrlsSolver(preset="paper").model_dump() == {"name": "irls", "preset": "paper", **paper}
    mine = IrlsSolver(preset="paper", iterations=3, ridge=0)
    assert (mine.iterations, mine.ridge, mine.damping) == (3, 0, 0.5)
    assert IrlsSolver().damping == 0


@pytest.mark.parametrize("field", [{"damping": 1.0}, {"iterations": -1}, {"ridge": -0.1}, {"p": 2.1}, {"p": 0.4}])
def test_parameters_outside_their_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(field))):
        IrlsSolver.model_validate(field)
