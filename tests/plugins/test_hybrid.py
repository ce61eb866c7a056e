"""Shrinkage of second moments: from the textbook, at its ends, and as estimators merge."""

import pytest
import torch
from torch import Tensor

from dashq import Estimator, Full, Layer
from recipes import REGISTRY


def estimate(x: Tensor, **fields: object) -> Full:
    estimator: Estimator = REGISTRY.estimators["hybrid"].model_validate(fields)
    state = estimator.update(estimator.start(Layer(name="l", rows=1, columns=x.shape[1])), x, torch.ones(len(x)))
    found = estimator.finish(state)
    assert isinstance(found, Full)
    return found


def noise(tokens: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))


def test_gamma_is_the_textbook_formula() -> None:
    x = noise(6, 3)
    products = torch.stack([torch.outer(row, row) for row in x.double()])  # one chunk for each token
    mean = products.mean(0)
    scale = mean.diagonal().rsqrt()
    variance_of_mean = (products - mean).square().sum(0) / (6 * 5) * torch.outer(scale, scale).square()
    correlation = mean * torch.outer(scale, scale)
    apart = ~torch.eye(3, dtype=torch.bool)
    expected = float(variance_of_mean[apart].sum() / correlation[apart].square().sum())
    assert estimate(x, chunk=1).tell["gamma"] == pytest.approx(min(1.0, expected), rel=1e-4)


def test_unrelated_columns_keep_only_their_diagonal() -> None:
    assert estimate(noise(64, 40), chunk=16).tell["gamma"] > 0.8


@pytest.mark.parametrize("tokens", [0, 1, 16])
def test_one_chunk_cannot_tell_signal_from_noise(tokens: int) -> None:
    found = estimate(noise(tokens, 5), chunk=16)
    assert found.tell["gamma"] == 1.0
    assert found.matrix.equal(torch.diag(found.matrix.diagonal()))


def test_gamma_falls_as_related_samples_grow() -> None:
    mixing = noise(8, 8, seed=1)
    gammas = [estimate(noise(tokens, 8) @ mixing, chunk=8).tell["gamma"] for tokens in (16, 256, 4096)]
    assert gammas[0] > gammas[1] > gammas[2]
    assert gammas[2] < 0.02


def test_a_given_gamma_is_taken_and_the_diagonal_stays() -> None:
    x = noise(50, 6)
    plain, shrunk = x.T @ x / 50, estimate(x, gamma=0.25).matrix
    torch.testing.assert_close(shrunk.diagonal(), plain.diagonal())
    torch.testing.assert_close(shrunk[0, 1], 0.75 * plain[0, 1])


def test_block_diagonal_forgets_what_lies_between_blocks() -> None:
    x = noise(30, 10)
    estimator = REGISTRY.estimators["block_diagonal"].model_validate({"size": 4})
    state = estimator.update(estimator.start(Layer(name="l", rows=1, columns=10)), x, torch.ones(30))
    found = estimator.finish(state)
    assert isinstance(found, Full)
    block = torch.arange(10) // 4
    expected = torch.where(block[:, None] == block, x.T @ x / 30, 0.0)
    torch.testing.assert_close(found.matrix, expected)
