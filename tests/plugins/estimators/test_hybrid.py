"""Shrinkage of second moments: from the textbook, at its ends, and as estimators merge."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dashq import Estimator, Full, Layer
from recipes import REGISTRY
from tensors import noise


def estimate(x: Tensor, **fields: object) -> Full:
    estimator: Estimator = REGISTRY.estimators["hybrid"].model_validate(fields)
    state = estimator.update(estimator.start(Layer(name="l", rows=1, columns=x.shape[1])), x, torch.ones(len(x)))
    curvature = estimator.finish(state)
    assert isinstance(curvature, Full)
    return curvature


def textbook(x: Tensor, chunk: int) -> float:
    """Σ Var(r_ij) / Σ r_ij² with the variance of a mean over so many chunks of equal length."""
    products = torch.stack([part.T @ part / chunk for part in x.double().split(chunk)])
    mean, chunks = products.mean(0), len(products)
    scale = mean.diagonal().rsqrt()
    variance_of_mean = (products - mean).square().sum(0) / (chunks * (chunks - 1)) * torch.outer(scale, scale).square()
    correlation = mean * torch.outer(scale, scale)
    apart = ~torch.eye(x.shape[1], dtype=torch.bool)
    return min(1.0, float(variance_of_mean[apart].sum() / correlation[apart].square().sum()))


@given(st.integers(0, 999), st.integers(1, 3))
def test_gamma_is_the_textbook_formula_of_the_length_that_tells_most(seed: int, chunk: int) -> None:
    x = noise(seed, 8 * chunk, 5) @ (torch.eye(5) + noise(seed + 1, 5, 5))
    expected = max(textbook(x, length) for length in (chunk, 2 * chunk, 4 * chunk))
    assert estimate(x, chunk=chunk).tell["gamma"] == pytest.approx(expected, rel=1e-3)


@given(st.integers(0, 999), st.sampled_from([2, 4]))
def test_tokens_that_say_the_same_again_do_not_count_as_more_evidence(seed: int, times: int) -> None:
    x = noise(seed, 16, 6) + 2 * noise(seed + 1, 16, 1)
    gamma = estimate(x.repeat_interleave(times, 0), chunk=1).tell["gamma"]
    assert gamma >= textbook(x, 1) * (1 - 1e-3)


@given(st.integers(1, 40), st.integers(1, 6))
def test_a_short_last_chunk_is_no_sign_of_noise(tokens: int, chunk: int) -> None:
    x = torch.tensor([[1.0, 2.0, -1.0]]).expand(tokens, 3)
    assert estimate(x, chunk=chunk).tell["gamma"] == (pytest.approx(0.0, abs=1e-5) if tokens > chunk else 1.0)


@pytest.mark.parametrize("documents", [2, 8, 32])
def test_shrunk_moments_are_nearer_to_the_truth_than_either_end(documents: int) -> None:
    mixing = noise(5, 24, 24) * torch.linspace(0.2, 1, 24)

    def distances(seed: int) -> Tensor:
        topics = 1 + noise(seed, documents, 24).repeat_interleave(16, 0)  # what a document's tokens have in common
        x = (topics + noise(seed + 1, 16 * documents, 24)) @ mixing
        truth = mixing.T @ (torch.ones(24, 24) + 2 * torch.eye(24)) @ mixing
        ends = [estimate(x, chunk=16, **fields).matrix for fields in ({}, {"gamma": 0.0}, {"gamma": 1.0})]
        scale = truth.diagonal().rsqrt()
        return torch.stack(
            [((end - truth) * torch.outer(scale, scale)).fill_diagonal_(0).square().sum() for end in ends]
        )

    ours, plain, diagonal = torch.stack([distances(10 * seed) for seed in range(20)]).mean(0).tolist()
    assert ours < min(plain, diagonal)


def test_gamma_is_estimated_among_some_columns_of_a_wide_layer() -> None:
    x = noise(0, 64, 4) @ noise(1, 4, 700) + noise(2, 64, 700)
    narrow, wide = estimate(x[:, ::3], chunk=4), estimate(x, chunk=4)
    assert wide.tell == pytest.approx(narrow.tell)
    torch.testing.assert_close(wide.matrix[:3, 3:], (1 - wide.tell["gamma"]) * (x.T @ x / 64)[:3, 3:])


def test_unrelated_columns_keep_only_their_diagonal() -> None:
    assert estimate(noise(0, 64, 40), chunk=16).tell["gamma"] > 0.8


@pytest.mark.parametrize("tokens", [0, 1, 16])
def test_one_chunk_cannot_tell_signal_from_noise(tokens: int) -> None:
    curvature = estimate(noise(0, tokens, 5), chunk=16)
    assert curvature.tell["gamma"] == 1.0
    assert curvature.matrix.equal(torch.diag(curvature.matrix.diagonal()))


def test_gamma_falls_as_related_samples_grow() -> None:
    mixing = noise(1, 8, 8)
    gammas = [estimate(noise(0, tokens, 8) @ mixing, chunk=8).tell["gamma"] for tokens in (16, 256, 4096)]
    assert gammas[0] > gammas[1] > gammas[2]
    assert gammas[2] < 0.02


def test_a_given_gamma_is_taken_and_the_diagonal_stays() -> None:
    x = noise(0, 50, 6)
    plain, shrunk = x.T @ x / 50, estimate(x, gamma=0.25).matrix
    torch.testing.assert_close(shrunk.diagonal(), plain.diagonal())
    torch.testing.assert_close(shrunk[0, 1], 0.75 * plain[0, 1])
