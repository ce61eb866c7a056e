"""The half-steps of `irls` are optimal, the whole descends, and nothing degenerate upsets it."""

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
from dashq.arithmetic import encode, group_importance, minmax_parameters
from dashq.examples import grids, importances, weights
from dashq_plugins import irls
from dashq_plugins.irls import IrlsSolver, fit, reweigh

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


@st.composite
def fits(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and codes that more or less follow them, both [1, 1, SIZE], and importances that sum to 1, in float64."""
    w, h = draw(weights(1, SIZE)).double(), draw(ANY_IMPORTANCES)
    around = 1.5 + (w - w.mean()) / w.std().clamp_min(1e-12) + 0.3 * normal(draw(SEEDS), SIZE)
    q = around.round().clamp(0, 3)
    v = group_importance(Diagonal(h), GROUPING).double()
    return w[None], q[None], v / v.sum()


def fitted(w: Tensor, q: Tensor, v: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Scale and offset, of examples only in which the codes determine a scale."""
    unlikely = torch.full((1, 1), 12345.0, dtype=torch.float64)
    s, m, _ = fit(w, q, v, ridge, unlikely)
    assume(not s.equal(unlikely))
    return s, m


@given(fits())
def test_scale_and_offset_are_those_of_least_squares(example: tuple[Tensor, Tensor, Tensor]) -> None:
    w, q, v = example
    s, m = fitted(w, q, v)
    root, columns = v.sqrt().numpy()[0], np.stack([q.numpy()[0, 0], np.ones(SIZE)], axis=1)
    expected = np.linalg.lstsq(columns * root[:, None], w.numpy()[0, 0] * root, rcond=None)[0]
    np.testing.assert_allclose([s.item(), m.item()], expected, rtol=1e-7, atol=1e-10)


@given(fits(), st.sampled_from([0.0, 0.01, 1.0]))
def test_the_gradient_vanishes_with_a_ridge_on_the_scale(example: tuple[Tensor, Tensor, Tensor], ridge: float) -> None:
    w, q, v = example
    s, m = (value.requires_grad_() for value in fitted(w, q, v, ridge))
    objective = (v * (w - s[..., None] * q - m[..., None]).square()).sum() + ridge * s.square().sum()
    for gradient in torch.autograd.grad(objective, (s, m)):
        assert gradient.abs().item() < 1e-10 * (1 + w.abs().max().item())


@given(fits(), st.floats(-100, 100), st.floats(0.01, 100), SEEDS)
def test_a_fit_follows_shift_and_scale_and_ignores_the_order(
    example: tuple[Tensor, Tensor, Tensor], shift: float, factor: float, seed: int
) -> None:
    w, q, v = example
    s, m = fitted(w, q, v)
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))
    moved = fitted((factor * w + shift)[..., order], q[..., order], v[..., order])
    torch.testing.assert_close(moved, (factor * s, factor * m + shift), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("codes", [[2.0] * SIZE, [float(SIZE - j) for j in range(SIZE)]], ids=["equal", "falling"])
def test_codes_that_give_no_positive_scale_leave_it_alone(codes: list[float]) -> None:
    w, q, v = torch.arange(SIZE).float()[None, None], torch.tensor(codes)[None, None], ONES[None] / SIZE
    s, m, q_mean = fit(w, q, v, 0.0, torch.tensor([[0.5]]))
    assert s.item() == 0.5
    torch.testing.assert_close(m, w.mean(-1) - 0.5 * q_mean)


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
@given(ANY_WEIGHTS, ANY_IMPORTANCES, BITS, st.sampled_from([0.5, 1.0, 1.5]))
def test_a_robust_norm_descends_in_its_own_objective(w: Tensor, h: Tensor, bits: int, p: float) -> None:
    w, shares = w.double()[:, None], group_importance(Diagonal(h), GROUPING).double()
    s, m = minmax_parameters(w, exact(bits))
    s = s.clamp_min(1e-6)
    floor = (0.01 * s).square()[..., None]
    objectives = []
    for _ in range(6):
        q = encode(w, s, m, exact(bits))
        v = reweigh(shares, w, q, s, m, floor, p)
        s, m, _ = fit(w, q, v, 0.0, s)
        objectives.append((shares * ((w - s[..., None] * q - m[..., None]).square() + floor) ** (p / 2)).sum(-1))
    assert all((later <= earlier * (1 + 1e-9)).all() for earlier, later in pairwise(objectives))


def test_a_robust_norm_trades_squared_for_absolute_error() -> None:
    w, h = normal(0, 256, 64), torch.ones(64)
    squares, robust = ((w - solve(w, h, exact(2), 64, p=p).dequantize()).abs() for p in (2.0, 1.5))
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
@given(SEEDS, ANY_IMPORTANCES, grids(), st.sampled_from([1, SIZE]))
def test_a_constant_group_is_reproduced(seed: int, h: Tensor, grid: Grid, size: int) -> None:
    w = normal(seed, ROWS, 1).to(grid.dtype).float().expand(ROWS, SIZE)
    assert solve(w, h, grid, size).dequantize().equal(w)


@few
@given(SEEDS, grids())
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
    monkeypatch.setattr(irls, "BLOCK", 64)
    torch.testing.assert_close(solve(w, h, exact(2), 8).dequantize(), together.dequantize())


def test_the_preset_paper_fills_in_what_is_not_said() -> None:
    paper = {"iterations": 9, "damping": 0.5, "ridge": 0.01, "p": 2.0}
    assert IrlsSolver(preset="paper").model_dump() == {"name": "irls", "preset": "paper", **paper}
    mine = IrlsSolver(preset="paper", iterations=3, ridge=0)
    assert (mine.iterations, mine.ridge, mine.damping) == (3, 0, 0.5)
    assert IrlsSolver().damping == 0


@pytest.mark.parametrize("field", [{"damping": 1.0}, {"iterations": -1}, {"ridge": -0.1}, {"p": 2.1}, {"p": 0.4}])
def test_parameters_outside_their_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(field))):
        IrlsSolver.model_validate(field)
