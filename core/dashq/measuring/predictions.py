"""Figures of a model's predictions, alone and beside those of its original, with their standard errors."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

CHUNK = 128  # tokens in a row, which count as one draw: neighbours are alike, and single tokens would look too certain
TOKENS_PER_PIECE = 256  # whose logits are in memory in float32 at a time


@dataclass
class Mean:
    """The mean of a figure over tokens, and its standard error from how much chunks of `CHUNK` tokens differ."""

    _sums: list[float] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)

    def add(self, values: Float[Tensor, " tokens"]) -> None:
        """Take in the figure of some tokens in a row."""
        chunks = values.double().split(CHUNK)
        self._sums += torch.stack([chunk.sum() for chunk in chunks]).tolist()
        self._sizes += [len(chunk) for chunk in chunks]

    def extend(self, later: Mapping[str, Sequence[Any]]) -> None:
        """Take in another mean's sums, as `asdict` gives them."""
        self._sums += later["_sums"]
        self._sizes += later["_sizes"]

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return sum(self._sizes)

    @property
    def value(self) -> float | None:
        """The mean; None where it is no number, or without a token."""
        mean = sum(self._sums) / self.tokens if self._sizes else math.nan
        return mean if math.isfinite(mean) else None

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None where it is no number, or with a single chunk."""
        mean, chunks = self.value, len(self._sums)
        if mean is None or chunks < 2:
            return None
        # Of a ratio, since the last chunk of a text can be shorter: the spread of what chunks have above their share.
        spread = sum((total - mean * size) ** 2 for total, size in zip(self._sums, self._sizes, strict=True))
        return math.sqrt(chunks / (chunks - 1) * spread) / self.tokens


@dataclass
class PredictionFigures:
    """Figures of predictions in nats per token; all but the first only beside an original.

    `loss` is the negative log-likelihood of what follows, `excess` how far it lies above the original's, `divergence`
    is Σ p (log p - log p̂) with p̂ predicted by the model, `agreement` the share of tokens after which both expect the
    same one most.
    """

    loss: Mean = field(default_factory=Mean)
    original_loss: Mean = field(default_factory=Mean)
    excess: Mean = field(default_factory=Mean)
    divergence: Mean = field(default_factory=Mean)
    agreement: Mean = field(default_factory=Mean)

    def extend(self, later: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
        """Take in the figures of further tokens, as `asdict` gives those of another one."""
        for name, mean in vars(self).items():
            mean.extend(later[name])

    def add(
        self,
        predicted: Float[Tensor, "tokens words"],
        next_tokens: Int[Tensor, " tokens"],
        expected: Float[Tensor, "tokens words"] | None = None,
    ) -> None:
        """Take in the logits for some tokens in a row, those of the original, and the tokens that follow."""
        originals: Sequence[Tensor | None] = [None] * -(-len(predicted) // TOKENS_PER_PIECE)
        if expected is not None:
            originals = expected.split(TOKENS_PER_PIECE)
        pieces = (predicted.split(TOKENS_PER_PIECE), next_tokens.split(TOKENS_PER_PIECE))
        for logits, following, original in zip(*pieces, originals, strict=True):
            own = logits.float().log_softmax(-1)
            loss = functional.nll_loss(own, following, reduction="none")
            self.loss.add(loss)
            if original is not None:
                other = original.to(own.device).float().log_softmax(-1)
                original_loss = functional.nll_loss(other, following, reduction="none")
                self.original_loss.add(original_loss)
                self.excess.add(loss.double() - original_loss.double())
                self.divergence.add(functional.kl_div(own, other, reduction="none", log_target=True).sum(-1))
                self.agreement.add((own.argmax(-1) == other.argmax(-1)).double())


def exponential(loss: Mean) -> tuple[float | None, float | None]:
    """exp of a mean loss, as perplexities and their ratios are, and its standard error."""
    if loss.value is None:
        return None, None
    # The largest loss whose exponential is a number; a higher one says no more.
    value = math.exp(min(loss.value, 700.0))
    error = None if loss.error is None else value * loss.error
    return value, error if error is None or math.isfinite(error) else None
