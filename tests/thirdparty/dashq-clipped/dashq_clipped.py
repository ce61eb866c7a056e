"""The estimator `clipped`: squared inputs, in which no single input counts for more than a limit."""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from dashq import Diagonal, Estimator, Layer, hookimpl


class ClippedEstimator(Estimator):
    """The sum of the squared inputs of each column, each input cut off at ± `limit`."""

    name = "clipped"
    limit: PositiveFloat = 6.0

    def start(self, layer: Layer) -> Tensor:
        return torch.zeros(layer.columns, dtype=torch.float64)

    def update(self, state: Tensor, x: Tensor, token_weight: Tensor) -> Tensor:
        return state.to(x.device) + (token_weight @ x.clamp(-self.limit, self.limit).square()).double()

    def merge(self, state: Tensor, other: Tensor) -> Tensor:
        return state + other

    def finish(self, state: Tensor) -> Diagonal:
        return Diagonal(state.float())


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [ClippedEstimator]
