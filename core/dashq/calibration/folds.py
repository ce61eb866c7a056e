"""Folds: what estimators learn from a layer's inputs, share by share of the samples, whichever process sees them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.data import Layer
from dashq.processes.group import here
from dashq.strategies import Estimator

Sums = TypeVar("Sums")


@dataclass(frozen=True, eq=False)
class FoldSums:
    """Sums over some tokens that a layer is given: the state of its estimator, and how many the tokens are.

    `weight` is Σw and `squares` is Σw² over the weights w of tokens, `input_shift` the sum of (x - x̂) x̂ᵀ.
    """

    state: Any
    tokens: int = 0
    weight: float = 0.0
    squares: float = 0.0
    input_shift: Float[Tensor, "columns columns"] | None = None

    @property
    def effective_tokens(self) -> float:
        """(Σw)² / Σw², by Kish; 0 where no token had a weight."""
        return self.weight**2 / self.squares if self.squares else 0.0


def gathered(
    shares: Sequence[Sums],
    merged: Callable[[Sums, Sums], Sums],
    empty: Sums,
    ranks: Collection[int],
    device: torch.device,
) -> Sums | None:
    """The sums of all processes' shares in those of these `ranks`; None in the others.

    They go from process to process, each of which adds its shares; the last one hands them out.
    """
    rank, last = here().rank, here().count - 1
    own = [*here().receive([empty], rank - 1, device), *shares] if rank > 0 else [*shares]
    so_far = [reduce(merged, own)] if own else []
    if rank < last:
        here().send(so_far, rank + 1)
    total = so_far[0] if so_far else empty
    for other in sorted({*ranks} - {last}):
        if rank == last:
            here().send(total, other)
        elif rank == other:
            total = here().receive(empty, last, device)
    return total if rank in ranks else None


class Fold:
    """The sums of one estimator over all that one layer is given.

    Those of each share of the samples are formed apart, and added in the order of the shares, so that the result does
    not depend on the number of processes that the shares are spread over. Shares without a token are left out.
    """

    def __init__(self, layer: Layer, estimator: Estimator) -> None:
        self.layer, self.estimator = layer, estimator
        self._open: FoldSums | None = None  # of a share that has not ended
        self._shares: list[FoldSums] = []

    def see(
        self,
        x: Float[Tensor, "tokens columns"],
        token_weight: Float[Tensor, " tokens"],
        original: Float[Tensor, "tokens columns"] | None = None,
    ) -> None:
        """Fold inputs in, each with its weight; the estimator gets them in float32.

        `original` is what the original model gives the layer for the same tokens.
        """
        sums, x = self._open or self._empty(), x.float()
        input_shift = sums.input_shift
        if original is not None:
            shift = (original.float() - x).T @ x
            input_shift = shift if input_shift is None else input_shift.add_(shift)
        self._open = FoldSums(
            self.estimator.update(sums.state, x, token_weight),
            sums.tokens + len(x),
            sums.weight + float(token_weight.sum()),
            sums.squares + float(token_weight.square().sum()),
            input_shift,
        )

    def end_share(self) -> None:
        """Every token of one share of the samples has been seen."""
        if self._open:
            self._shares.append(self._open)
            self._open = None
        if here().is_first:  # no other process's shares come before its own: one state is kept, not one of each
            self._shares = self._added(self._shares)

    def sums(self) -> FoldSums:
        """The sums over all that this process has seen."""
        self.end_share()
        return self._total(self._shares)

    def collected(self, ranks: Collection[int], device: torch.device) -> FoldSums | None:
        """The sums over all that all processes have seen, in those of these `ranks`; None in the others."""
        return gathered(self._shares, self._merged, self._empty(), ranks, device)

    def _total(self, shares: list[FoldSums]) -> FoldSums:
        return next(iter(self._added(shares)), None) or self._empty()

    def _empty(self) -> FoldSums:
        return FoldSums(self.estimator.start(self.layer))

    def _added(self, shares: list[FoldSums]) -> list[FoldSums]:
        """All shares as one; none where there are none."""
        return [reduce(self._merged, shares)] if shares else []

    def _merged(self, one: FoldSums, other: FoldSums) -> FoldSums:
        shifts = [sums.input_shift for sums in (one, other) if sums.input_shift is not None]
        return FoldSums(
            self.estimator.merge(one.state, other.state),
            one.tokens + other.tokens,
            one.weight + other.weight,
            one.squares + other.squares,
            reduce(torch.add, shifts) if shifts else None,
        )
