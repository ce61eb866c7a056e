"""The comparison of a quantized model with its original, as the report keeps it and people read it."""

import math
from dataclasses import dataclass

# A model is called destroyed beyond this divergence: on average the original's choices have lost nine tenths of their
# probability.
DESTROYED = math.log(10)


@dataclass(frozen=True)
class Continuation:
    """A prompt, and how the original and the quantized model go on, each word their most likely one."""

    prompt: str
    original: str
    quantized: str


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The quantized model's predictions beside the original's, on `tokens` tokens of the recipe's text.

    `divergence` is Σ p (log p - log p̂) in nats per token, with p̂ predicted by the quantized model; `agreement` is the
    share of tokens after which both expect the same one most. Both perplexities are on the same tokens. None stands for
    predictions that are no numbers. Errors are standard errors, from how much chunks of the text differ; `ratio_error`
    is that of the `ratio` of both perplexities, which the same text makes smaller than theirs. `held_out` says that
    calibration did not see these tokens. `continuation` is there where the whole model was small enough.
    """

    tokens: int
    held_out: bool
    divergence: float | None
    divergence_error: float | None = None
    agreement: float
    agreement_error: float | None = None
    perplexity: float | None
    perplexity_error: float | None = None
    original_perplexity: float | None
    original_perplexity_error: float | None = None
    ratio_error: float | None = None
    continuation: Continuation | None = None

    @property
    def ratio(self) -> float | None:
        """The perplexity, as a multiple of the original's."""
        if self.perplexity is None or not self.original_perplexity:
            return None
        return self.perplexity / self.original_perplexity

    @property
    def warning(self) -> str | None:
        """A sentence where the quantized model is destroyed."""
        if self.divergence is not None and self.divergence <= DESTROYED:
            return None
        return (
            f"the quantized model is destroyed: only {self.agreement:.0%} of its first choices are the original's. "
            "More bits, smaller groups, real zeros or a solver that uses more of the curvature help"
        )

    @property
    def text(self) -> str:
        """The tokens that were judged on, in words."""
        return (
            f"{self.tokens:,} tokens {'that calibration did not see' if self.held_out else 'of the calibration text'}"
        )

    def figures(self) -> dict[str, str]:
        """The figures with their errors, by name."""
        share = None if self.agreement_error is None else 100 * self.agreement_error
        return {
            "perplexity": measured(self.perplexity, self.perplexity_error),
            "perplexity of the original": measured(self.original_perplexity, self.original_perplexity_error),
            "ratio of both": measured(self.ratio, self.ratio_error),
            "divergence (KL), nats per token": measured(self.divergence, self.divergence_error),
            "first choices the same": f"{measured(100 * self.agreement, share)} %",
        }

    def __str__(self) -> str:
        """The figures in words, as summary and model card show them."""
        perplexity, original, _, divergence, agreement = self.figures().values()
        divergence += "" if self.divergence is None else " nats per token"
        return (
            f"perplexity {perplexity} where the original has {original}, divergence {divergence}, {agreement} of first "
            f"choices the same ({self.text})"
        )


def measured(value: float | None, error: float | None = None) -> str:
    """A figure as far as its standard error lets it be told, and the error; or `no number`."""
    if value is None:
        return "no number"
    if not error:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))  # two digits of the error
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}" if abs(value) < 1e6 else f"{value:.2g} ± {error:.1g}"
