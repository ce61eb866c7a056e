"""Figures of predictions are means over tokens, and their errors tell how far other text would move them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from dashq.measuring.predictions import CHUNK, TOKENS_PER_PIECE, Mean, PredictionFigures, exponential


def mean_of(*pieces: torch.Tensor) -> Mean:
    mean = Mean()
    for piece in pieces:
        mean.add(piece)
    return mean


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=5))
def test_the_mean_is_that_of_all_tokens_however_they_come(lengths: list[int]) -> None:
    pieces = random(sum(lengths)).split(lengths)
    mean = mean_of(*pieces)
    assert mean.tokens == sum(lengths)
    assert mean.value == pytest.approx(float(torch.cat(pieces).double().mean()))


@given(st.integers(2, 20))
def test_the_error_is_the_standard_error_of_the_means_of_chunks(chunks: int) -> None:
    values = random(chunks, CHUNK)
    expected = float(values.double().mean(1).std() / math.sqrt(chunks))
    assert mean_of(values.flatten()).error == pytest.approx(expected)


def test_neighbours_that_are_alike_do_not_make_a_mean_look_surer() -> None:
    once = random(40)
    repeated = once.repeat_interleave(CHUNK)
    assert mean_of(repeated).error == pytest.approx(float(once.double().std() / math.sqrt(40)))


def test_a_single_chunk_has_no_error_and_what_is_no_number_no_mean() -> None:
    assert mean_of(torch.ones(CHUNK)).error is None
    assert mean_of(torch.ones(CHUNK + 1)).error == 0
    assert Mean().value is None
    lost = mean_of(torch.tensor([1.0, math.nan]), torch.ones(CHUNK))
    assert (lost.value, lost.error) == (None, None)


def test_predictions_beside_an_original_are_as_defined_in_pieces_too() -> None:
    tokens, words = TOKENS_PER_PIECE + 7, 11
    predicted, expected = random(tokens, words), random(tokens, words, seed=1)
    next_tokens = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(2))
    figures = PredictionFigures()
    figures.add(predicted, next_tokens, expected)
    p, q = expected.double().log_softmax(-1), predicted.double().log_softmax(-1)
    losses = [functional.nll_loss(x, next_tokens) for x in (q, p)]
    assert figures.loss.value == pytest.approx(float(losses[0]), rel=1e-5)
    assert figures.original_loss.value == pytest.approx(float(losses[1]), rel=1e-5)
    assert figures.excess.value == pytest.approx(float(losses[0] - losses[1]), rel=1e-4)
    assert figures.divergence.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert figures.agreement.value == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_predictions_beside_themselves_differ_in_nothing() -> None:
    logits, next_tokens = random(3 * CHUNK, 5), torch.zeros(3 * CHUNK, dtype=torch.int64)
    figures = PredictionFigures()
    figures.add(logits, next_tokens, logits)
    assert (figures.divergence.value, figures.agreement.value, figures.excess.value) == (0, 1, 0)
    assert (figures.divergence.error, figures.excess.error) == (0, 0)


def test_a_model_alone_has_a_loss_and_nothing_else() -> None:
    figures = PredictionFigures()
    figures.add(random(3, 5), torch.zeros(3, dtype=torch.int64))
    assert figures.loss.tokens == 3
    assert figures.divergence.value is None


def test_a_perplexity_has_the_error_of_its_loss_times_itself() -> None:
    loss = mean_of(random(10 * CHUNK))
    value, error = exponential(loss)
    assert loss.value is not None
    assert loss.error is not None
    assert (value, error) == (math.exp(loss.value), math.exp(loss.value) * loss.error)
    assert exponential(Mean()) == (None, None)
    assert exponential(mean_of(torch.full((CHUNK,), 1e4)))[0] == math.exp(700)
