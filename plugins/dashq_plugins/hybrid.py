"""Second moments shrunk towards their diagonal, by as much as they are noise."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from dashq import Estimator, Full, Layer, hookimpl


@dataclass(frozen=True, eq=False)
class ChunkSums:
    """Sums over chunks of successive tokens: of each chunk's sum of products, and of its square, entry by entry."""

    products: Float[Tensor, "columns columns"]
    squares: Float[Tensor, "columns columns"]
    tokens: Float[Tensor, ""]
    chunks: int


class HybridEstimator(Estimator):
    """H_γ = (1 - γ) H + γ diag H: the diagonal where samples are few, the whole matrix where there are many.

    γ = Σ Var(r_ij) / Σ r_ij² over the correlations r_ij of different columns (Schäfer and Strimmer 2005), with the
    variance taken from how much chunks of `chunk` successive tokens differ; or `gamma`, where the recipe says so.
    """

    name = "hybrid"
    produces = Full
    gamma: float | None = Field(default=None, ge=0, le=1)
    chunk: PositiveInt = 64

    @property
    def grain(self) -> int:
        return self.chunk

    def start(self, layer: Layer) -> ChunkSums:
        empty = torch.zeros(layer.columns, layer.columns)
        return ChunkSums(empty, empty.clone(), torch.zeros((), dtype=torch.float64), 0)

    def update(
        self, state: ChunkSums, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]
    ) -> ChunkSums:
        products, squares, chunks = state.products.to(x.device), state.squares.to(x.device), state.chunks
        for some_x, weight in zip(x.split(self.chunk), token_weight.split(self.chunk), strict=True):
            if weight.any():
                chunk = some_x.T @ (weight[:, None] * some_x)
                products.add_(chunk)
                squares.addcmul_(chunk, chunk)
                chunks += 1
        return ChunkSums(products, squares, state.tokens.to(x.device) + token_weight.sum(), chunks)

    def merge(self, state: ChunkSums, other: ChunkSums) -> ChunkSums:
        return ChunkSums(
            state.products + other.products,
            state.squares + other.squares,
            state.tokens + other.tokens,
            state.chunks + other.chunks,
        )

    def finish(self, state: ChunkSums) -> Full:
        matrix = state.products / state.tokens.clamp_min(1e-12).float()
        gamma = _shrinkage(state) if self.gamma is None else self.gamma
        diagonal = matrix.diagonal().clone()
        matrix.mul_(1 - gamma).diagonal().copy_(diagonal)
        return Full(matrix, tell={"gamma": gamma})


def _shrinkage(sums: ChunkSums) -> float:
    """γ in [0, 1]; 1 where there are too few chunks, or no correlations, to tell."""
    n = sums.chunks
    if n < 2:
        return 1.0
    scale = sums.products.diagonal().clamp_min(1e-30).rsqrt()
    # Of the sum over all chunks, from how much they differ.
    variance = (sums.squares - sums.products.square() / n).clamp_min(0) * (n / (n - 1))
    noise, signal = (
        _off_diagonal(scale[:, None].square() * x * scale.square()) for x in (variance, sums.products.square())
    )
    return min(1.0, noise / signal) if signal > 0 else 1.0


def _off_diagonal(x: Float[Tensor, "columns columns"]) -> float:
    return float(x.sum(dtype=torch.float64) - x.diagonal().sum(dtype=torch.float64))


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [HybridEstimator]
