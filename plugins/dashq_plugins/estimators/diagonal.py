"""h_j = mean of the squared inputs of column j: the diagonal of XᵀX, the paper's curvature."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat
from torch import Tensor

from dashq import Diagonal, Estimator, Layer, hookimpl


@dataclass(frozen=True, eq=False)
class SquareSums:
    """Sums over tokens, in float64 so that the order of batches does not show."""

    squares: Float[Tensor, " columns"]
    tokens: Float[Tensor, ""]


class DiagonalEstimator(Estimator):
    """The second moment of each input column (arXiv 2604.13806): stable from two samples on.

    `damping` is added to each, as a share of their mean: the noise that quantized layers before this one will bring.
    """

    name = "diagonal"
    damping: NonNegativeFloat = 0.0

    def start(self, layer: Layer) -> SquareSums:
        return SquareSums(torch.zeros(layer.columns, dtype=torch.float64), torch.zeros((), dtype=torch.float64))

    def update(
        self, state: SquareSums, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]
    ) -> SquareSums:
        squares = (token_weight @ x.square()).double()
        return SquareSums(state.squares.to(x.device) + squares, state.tokens.to(x.device) + token_weight.sum())

    def merge(self, state: SquareSums, other: SquareSums) -> SquareSums:
        return SquareSums(state.squares + other.squares, state.tokens + other.tokens)

    def finish(self, state: SquareSums) -> Diagonal:
        squares = state.squares / state.tokens.clamp_min(1e-12)
        return Diagonal((squares + self.damping * squares.mean()).float())


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [DiagonalEstimator]
