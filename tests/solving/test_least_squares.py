"""Scale and zero are those of weighted least squares, on every kind of grid."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dashq import Diagonal, Grid, Grouping
from dashq.data import Zero
from dashq.solving.arithmetic import group_importance
from dashq.solving.least_squares import Fit, Moments, fit
from dashq.solving.stored_values import Levels
from dashq.testing.examples import importances, weights
from tensors import noise

SIZE = 12
GROUPING = Grouping(columns=SIZE, size=SIZE)
ANY_IMPORTANCES = importances(SIZE)
SEEDS = st.integers(0, 999)


Example = tuple[Tensor, Tensor, Tensor]


@st.composite
def fits(draw: st.DrawFn) -> Example:
    """Weights and codes that more or less follow them, both [1, SIZE], and importances that sum to 1, in float64."""
    w, h = draw(weights(1, SIZE)).double(), draw(ANY_IMPORTANCES)
    around = 1.5 + (w - w.mean()) / w.std().clamp_min(1e-12) + 0.3 * noise(draw(SEEDS), SIZE)
    v = group_importance(Diagonal(h), GROUPING).double()
    return w, around.round().clamp(0, 3), v[0] / v.sum()


def fitted(example: Example, zero: Zero = "real", ridge: float = 0.0, negative_scales: bool = False) -> Fit:
    """The fit to given codes, of examples only in which they determine a scale."""
    w, q, v = example
    start = torch.full_like(w[:, :1], 2.0)
    d = q - start
    sums = [(v * term).sum(1, keepdim=True) for term in (torch.ones_like(w), w, d, d * d, d * w)]
    grid = Grid(bits=2, dtype=torch.float32, zero=zero, negative_scales=negative_scales)
    solution = fit(Moments(*sums), torch.full_like(start, 12345.0), start, Levels.of(grid, w), ridge)
    assume(solution.scale.item() != 12345.0)
    return solution


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
    solution = fit(Moments(*sums), torch.full_like(sums[0], 0.5), torch.full_like(sums[0], 2.0), levels)
    assert (solution.gain.item(), solution.scale.item(), solution.zero.item()) == (0.0, 0.5, 2.0)
