"""`diagonal` is the mean of each column's squares, however many tokens there are and however they weigh."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from dashq import Diagonal, Layer
from dashq_plugins.estimators.diagonal import DiagonalEstimator
from tensors import noise


def estimate(x: Tensor, token_weight: Tensor | None = None, batch: int = 1000, damping: float = 0.0) -> Diagonal:
    estimator = DiagonalEstimator(damping=damping)
    state = estimator.start(Layer(name="l", rows=1, columns=x.shape[1]))
    weights = torch.ones(len(x)) if token_weight is None else token_weight
    for rows, counts in zip(x.split(batch), weights.split(batch), strict=True):
        state = estimator.update(state, rows, counts)
    return estimator.finish(state)


@given(st.integers(0, 999), st.integers(1, 20), st.integers(1, 20), st.integers(1, 25))
def test_it_is_the_weighted_mean_of_squares(seed: int, tokens: int, columns: int, batch: int) -> None:
    x, counts = noise(seed, tokens, columns), noise(seed + 1, tokens).abs() + 0.1
    expected = (counts.double() @ x.double().square() / counts.double().sum()).float()
    torch.testing.assert_close(estimate(x, counts, batch).values, expected)


def test_a_token_of_weight_zero_is_not_seen() -> None:
    x = torch.tensor([[1.0, 2.0], [1e18, 1e18]])
    assert estimate(x, torch.tensor([1.0, 0.0])).values.tolist() == [1.0, 4.0]


def test_before_any_token_nothing_is_important() -> None:
    assert estimate(torch.empty(0, 3)).values.tolist() == [0.0, 0.0, 0.0]
    assert estimate(torch.empty(0, 3), damping=0.1).values.tolist() == [0.0, 0.0, 0.0]
    assert estimate(noise(0, 4, 3), torch.zeros(4)).values.tolist() == [0.0, 0.0, 0.0]


@given(st.integers(0, 999), st.floats(0, 2))
def test_damping_adds_its_share_of_the_mean_to_every_column(seed: int, damping: float) -> None:
    x = noise(seed, 9, 5)
    plain = estimate(x).values
    torch.testing.assert_close(estimate(x, damping=damping).values, plain + damping * plain.mean())


def test_many_batches_lose_nothing_that_one_would_keep() -> None:
    x = torch.ones(40_000, 1)
    x[0], x[1:8] = 2**14, 0  # after whose square a float32 no longer counts eight ones
    assert estimate(x, batch=8).values.item() == pytest.approx((2**28 + 39_992) / 40_000, rel=1e-7)
    assert estimate(x.flip(0), batch=8).values.equal(estimate(x, batch=8).values)


def test_a_negative_damping_is_refused() -> None:
    with pytest.raises(ValidationError, match="damping"):
        DiagonalEstimator(damping=-0.1)
