"""The whole second moment of the inputs, H = XᵀX / tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dashq import Estimator, Full, Layer, hookimpl
from dashq_plugins.estimators.products import add_products, mirrored


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over tokens; those of products are float32 and valid in their upper half alone."""

    products: Float[Tensor, "columns columns"]
    tokens: Float[Tensor, ""]


class FullEstimator(Estimator):
    """Second moments of all pairs of columns: all that the error of a layer depends on, given enough tokens."""

    name = "full"
    produces = Full

    def start(self, layer: Layer) -> Sums:
        return Sums(torch.zeros(layer.columns, layer.columns), torch.zeros((), dtype=torch.float64))

    def update(self, state: Sums, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]) -> Sums:
        products = state.products.to(x.device)
        add_products(products, x, token_weight)
        return Sums(products, state.tokens.to(x.device) + token_weight.sum())

    def merge(self, state: Sums, other: Sums) -> Sums:
        return Sums(state.products + other.products, state.tokens + other.tokens)

    def finish(self, state: Sums) -> Full:
        return Full(mirrored(state.products).div_(state.tokens.clamp_min(1e-12).float()))


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [FullEstimator]
