"""`full` is the whole second moment of the inputs, symmetric, and as exact as its diagonal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dashq import Full, Layer
from dashq_plugins.estimators.diagonal import DiagonalEstimator
from dashq_plugins.estimators.full import FullEstimator
from tensors import noise


def estimate(x: Tensor, token_weight: Tensor | None = None, batch: int = 1000) -> Full:
    estimator = FullEstimator()
    state = estimator.start(Layer(name="l", rows=1, columns=x.shape[1]))
    weights = torch.ones(len(x)) if token_weight is None else token_weight
    for rows, counts in zip(x.split(batch), weights.split(batch), strict=True):
        state = estimator.update(state, rows, counts)
    return estimator.finish(state)


@given(st.integers(0, 999), st.integers(1, 20), st.integers(1, 20), st.integers(1, 25))
def test_it_is_the_weighted_mean_of_products(seed: int, tokens: int, columns: int, batch: int) -> None:
    x, counts = noise(seed, tokens, columns), noise(seed + 1, tokens).abs() + 0.1
    expected = x.double().T @ (counts.double()[:, None] * x.double()) / counts.double().sum()
    curvature = estimate(x, counts, batch)
    torch.testing.assert_close(curvature.matrix, expected.float(), rtol=1e-4, atol=1e-5)
    assert curvature.matrix.equal(curvature.matrix.T)


@pytest.mark.parametrize("columns", [300, 600])
def test_wide_layers_have_all_pairs_of_columns(columns: int) -> None:
    x = noise(0, 20, columns)
    torch.testing.assert_close(estimate(x, batch=7).matrix, x.T @ x / 20, rtol=1e-4, atol=1e-5)


def test_its_diagonal_is_that_of_the_diagonal_estimator_and_nothing_is_shrunk() -> None:
    x, estimator = noise(0, 30, 8), DiagonalEstimator()
    state = estimator.update(estimator.start(Layer(name="l", rows=1, columns=8)), x, torch.ones(30))
    curvature = estimate(x)
    torch.testing.assert_close(curvature.diagonal(), estimator.finish(state).values)
    assert curvature.shrinkage == 0
    assert curvature.report == {}


def test_before_any_token_it_is_all_zero() -> None:
    assert not estimate(torch.empty(0, 3)).matrix.any()
    assert not estimate(noise(0, 4, 3), torch.zeros(4)).matrix.any()


def test_merged_states_are_as_good_as_one_and_stay_as_they_were() -> None:
    x, estimator = noise(0, 20, 6), FullEstimator()
    start = estimator.start(Layer(name="l", rows=1, columns=6))
    one, other = (
        estimator.update(estimator.start(Layer(name="l", rows=1, columns=6)), part, torch.ones(10))
        for part in x.split(10)
    )
    before = estimator.finish(one).matrix
    torch.testing.assert_close(estimator.finish(estimator.merge(one, other)).matrix, x.T @ x / 20)
    assert estimator.finish(one).matrix.equal(before)
    assert estimator.finish(estimator.merge(start, one)).matrix.equal(before)
