"""The estimator `clipped`: squared inputs, in which no single input counts for more than a limit."""

import torch
from jaxtyping import Float
from pydantic import PositiveFloat
from torch import Tensor

from dashq import Diagonal, Estimator, Layer, hookimpl

Sums = Float[Tensor, " columns"]


class ClippedEstimator(Estimator):
    """The sum of the squared inputs of each column, each input cut off at ± `limit`."""

    name = "clipped"
    limit: PositiveFloat = 6.0

    def start(self, layer: Layer) -> Sums:
        return torch.zeros(layer.columns, dtype=torch.float64)

    def update(self, state: Sums, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]) -> Sums:
        return state.to(x.device) + (token_weight @ x.clamp(-self.limit, self.limit).square()).double()

    def merge(self, state: Sums, other: Sums) -> Sums:
        return state + other

    def finish(self, state: Sums) -> Diagonal:
        return Diagonal(state.float())


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [ClippedEstimator]
