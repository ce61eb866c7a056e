"""Second moments shrunk towards their diagonal, by as much as they are noise."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from dashq import Estimator, Full, Layer, hookimpl
from dashq_plugins.estimators.products import add_products, mirrored

COLUMNS = 256  # among which γ is estimated, at most: evenly spread, and many enough for tens of thousands of pairs
SCALES = 3  # lengths of chunks: each twice the one before


@dataclass(frozen=True, eq=False)
class ChunkSums:
    """Sums over tokens of products, valid in their upper half alone, and sums over chunks at each scale.

    P is a chunk's sum of products among the sampled columns, and t the weight of its tokens.
    """

    products: Float[Tensor, "columns columns"]
    tokens: Float[Tensor, ""]
    squares: Float[Tensor, "scales sampled sampled"]  # Σ P²
    crossed: Float[Tensor, "scales sampled sampled"]  # Σ t P
    sizes: Float[Tensor, " scales"]  # Σ t²
    chunks: Int[Tensor, " scales"]


class Chunk(NamedTuple):
    """Successive tokens: the sum of their products among the sampled columns, and their weight."""

    products: Float[Tensor, "sampled sampled"]
    size: Float[Tensor, ""]


class HybridEstimator(Estimator):
    """H_γ = (1 - γ) H + γ diag H: the diagonal where samples are few, the whole matrix where there are many.

    γ = Σ Var(r_ij) / Σ r_ij² over the correlations r_ij of different columns (Schäfer and Strimmer 2005); or `gamma`,
    where the recipe says so. The variance is taken from how much chunks of successive tokens differ. Tokens of one text
    are alike, so that short chunks differ too little: of chunks of `chunk`, twice and four times as many tokens, those
    count that give the largest γ.
    """

    name = "hybrid"
    produces = Full
    gamma: float | None = Field(default=None, ge=0, le=1)
    chunk: PositiveInt = 512

    @property
    def chunk_tokens(self) -> int:
        return self.chunk << (SCALES - 1)

    def start(self, layer: Layer) -> ChunkSums:
        sampled = len(range(layer.columns)[:: _step(layer.columns)])
        products, squares = torch.zeros(layer.columns, layer.columns), torch.zeros(SCALES, sampled, sampled)
        nothing = torch.zeros(SCALES, dtype=torch.float64)
        return ChunkSums(products, nothing.sum(), squares, squares.clone(), nothing, nothing.long())

    def update(
        self, state: ChunkSums, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]
    ) -> ChunkSums:
        state = ChunkSums(*(part.to(x.device) for part in vars(state).values()))
        add_products(state.products, x, token_weight)
        sampled = x[:, :: _step(x.shape[1])]
        for part, weight in zip(sampled.split(self.chunk_tokens), token_weight.split(self.chunk_tokens), strict=True):
            chunks = [
                Chunk((weights[:, None] * rows).T @ rows, weights.sum())
                for rows, weights in zip(part.split(self.chunk), weight.split(self.chunk), strict=True)
            ]
            for scale in range(SCALES):
                for products, size in chunks:
                    state.squares[scale].addcmul_(products, products)
                    state.crossed[scale].add_(size * products)
                    state.sizes[scale] += size.double().square()
                    state.chunks[scale] += size > 0
                chunks = _joined(chunks)
        return ChunkSums(**vars(state) | {"tokens": state.tokens + token_weight.sum()})

    def merge(self, state: ChunkSums, other: ChunkSums) -> ChunkSums:
        pairs = zip(vars(state).values(), vars(other).values(), strict=True)
        return ChunkSums(*(one + another for one, another in pairs))

    def finish(self, state: ChunkSums) -> Full:
        matrix = mirrored(state.products).div_(state.tokens.clamp_min(1e-12).float())
        gamma = _shrinkage(state) if self.gamma is None else self.gamma
        diagonal = matrix.diagonal().clone()
        matrix.mul_(1 - gamma).diagonal().copy_(diagonal)
        return Full(matrix, shrinkage=gamma, tell={"gamma": gamma})


def _shrinkage(sums: ChunkSums) -> float:
    """γ in [0, 1]; 1 where there are too few chunks, or no correlations."""
    step = _step(len(sums.products))
    products, tokens = mirrored(sums.products[::step, ::step]), float(sums.tokens)
    scale = products.diagonal().clamp_min(1e-30).reciprocal()
    signal = _off_diagonal(scale[:, None] * products.square() * scale)
    shares = []
    scales = zip(sums.squares, sums.crossed, sums.sizes.tolist(), sums.chunks.tolist(), strict=True)
    for squares, crossed, size, chunks in scales:
        if chunks > 1 and signal > 0:
            # Σ (P - t M)² with the mean M over all tokens: what the sum over all chunks varies by.
            mean = products / tokens
            deviations = (squares - 2 * mean * crossed + size * mean.square()).clamp_min(0)
            shares.append(chunks / (chunks - 1) * _off_diagonal(scale[:, None] * deviations * scale) / signal)
    return min(1.0, max(shares, default=1.0))


def _joined(chunks: list[Chunk]) -> list[Chunk]:
    """Sums of neighbours; the last one is left alone where their number is odd."""
    pairs = zip(chunks[::2], chunks[1::2], strict=False)
    joined = [Chunk(one.products + other.products, one.size + other.size) for one, other in pairs]
    return joined + chunks[len(chunks) // 2 * 2 :]


def _step(columns: int) -> int:
    return -(-columns // COLUMNS)


def _off_diagonal(x: Float[Tensor, "columns columns"]) -> float:
    return float(x.sum(dtype=torch.float64) - x.diagonal().sum(dtype=torch.float64))


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [HybridEstimator]
