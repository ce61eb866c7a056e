"""The signal-to-noise of the entries of H = XᵀX, on its diagonal and off it: near 1 an entry is mere chance."""

import operator
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dashq.calibration.folds import gathered
from dashq.strict import Strict

COLUMNS = 256  # evenly spread over the layer's: only entries among them are measured
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class SignalToNoise(Strict):
    """Quantiles of |mean| / standard error over the entries, from how much `batches` of tokens differ.

    An entry that is nothing but noise has a value of about 1 or below.
    """

    batches: int
    diagonal: tuple[float, ...]
    off_diagonal: tuple[float, ...]

    @classmethod
    def of(
        cls, moments: Float[Tensor, "columns columns"], squares: Float[Tensor, "columns columns"], n: int
    ) -> "SignalToNoise":
        """Quantiles from the sums of n batches' second moments, and of the squares of these, entry by entry."""
        mean = moments / n
        # The variance between batches, and from it the standard error of their mean.
        variance = (squares / n - mean.square()).clamp_min(0) * (n / (n - 1))
        error = (variance / n).sqrt()
        # Batches that are all equal have no error: the ratio ends at 1e9.
        ratio = mean.abs() / error.maximum(1e-9 * mean.abs()).clamp_min(1e-30)
        off = ~torch.eye(len(ratio), dtype=torch.bool, device=ratio.device)
        return cls(batches=n, diagonal=_quantiles(ratio.diagonal()), off_diagonal=_quantiles(ratio[off]))


@dataclass(frozen=True, eq=False)
class NoiseSums:
    """Sums over so many `batches` of tokens: of their second moments, and of the squares of these, entry by entry."""

    moments: Float[Tensor, "columns columns"] | None = None
    squares: Float[Tensor, "columns columns"] | None = None
    batches: int = 0

    def __add__(self, other: "NoiseSums") -> "NoiseSums":
        if self.moments is None or self.squares is None:
            return other
        if other.moments is None or other.squares is None:
            return self
        return NoiseSums(self.moments + other.moments, self.squares + other.squares, self.batches + other.batches)


class NoiseWatcher:
    """Folds the inputs of one layer into second moments, batch by batch of `tokens` tokens.

    Those of each share of the samples are added up apart, as estimators' states are.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._open, self._shares = NoiseSums(), [NoiseSums()]

    def see(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook of the layer."""
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        columns = torch.linspace(0, x.shape[1] - 1, min(COLUMNS, x.shape[1]), device=x.device).round().long()
        for batch in x[:, columns].float().split(self._tokens):
            moments = (batch.T @ batch / len(batch)).double()
            self._open += NoiseSums(moments, moments.square(), 1)

    def end_share(self) -> None:
        """Every token of one share of the samples has been seen."""
        self._shares.append(self._open)
        self._open = NoiseSums()

    def collect(self, rank: int, device: torch.device) -> None:
        """Let the process of this rank know what all have seen."""
        total = gathered(self._shares, operator.add, NoiseSums(), {rank}, device)
        self._shares = [total or NoiseSums()]

    def signal_to_noise(self) -> SignalToNoise | None:
        """The quantiles over the measured entries; None where one batch or one column is all there is."""
        sums = reduce(operator.add, [*self._shares, self._open])
        if sums.moments is None or sums.squares is None or sums.batches < 2 or len(sums.moments) < 2:
            return None
        return SignalToNoise.of(sums.moments, sums.squares, sums.batches)


def _quantiles(values: Float[Tensor, " entries"]) -> tuple[float, ...]:
    ordered = values.sort().values  # torch.quantile takes no more than 16 million
    return tuple(float(ordered[round(share * (len(ordered) - 1))]) for share in QUANTILES)
