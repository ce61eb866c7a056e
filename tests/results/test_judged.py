"""A judgement is told in words, as far as its errors let it be told."""

from dataclasses import replace

import pytest

from dashq.results.judged import Judgement

GOOD = Judgement(tokens=8, held_out=True, divergence=0.25, agreement=0.875, perplexity=12.0, original_perplexity=10.0)


@pytest.mark.parametrize(
    ("divergence", "agreement", "destroyed"),
    [(0.0, 1.0, False), (2.3, 0.3, False), (2.31, 0.1, True), (None, 0.0, True)],
)
def test_a_destroyed_model_is_called_so(divergence: float | None, agreement: float, destroyed: bool) -> None:
    judgement = replace(GOOD, divergence=divergence, agreement=agreement)
    assert bool(judgement.warning) == destroyed
    if destroyed:
        assert f"destroyed: only {agreement:.0%} of its first choices are the original's" in str(judgement.warning)


def test_the_figures_are_told_in_words() -> None:
    assert str(GOOD) == (
        "perplexity 12 where the original has 10, divergence 0.25 nats per token, 87.5 % of first choices the same "
        "(8 tokens that calibration did not see)"
    )
    sure = replace(GOOD, divergence_error=0.0123, agreement_error=0.019, ratio_error=0.012)
    sure = replace(sure, perplexity_error=0.52, original_perplexity_error=0.4)
    assert sure.figures() == {
        "perplexity": "12.00 ± 0.52",
        "perplexity of the original": "10.00 ± 0.40",
        "ratio of both": "1.200 ± 0.012",
        "divergence (KL), nats per token": "0.250 ± 0.012",
        "first choices the same": "87.5 ± 1.9 %",
    }
    lost = str(replace(GOOD, divergence=None, perplexity=None, original_perplexity=1.8e7))
    assert "divergence no number" in lost
    assert "perplexity no number where the original has 1.8e+07" in lost
