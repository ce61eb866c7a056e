"""Second moments of the columns within a block, nothing between blocks."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional

from dashq import Coupled, Curvature, Estimator, Layer, hookimpl


class BlockSums(NamedTuple):
    """Sums of products within each block, and the numbers of columns and of tokens."""

    products: Float[Tensor, "blocks size size"]
    columns: int
    tokens: Float[Tensor, ""]


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Coupled):
    """H as its blocks, the last of them filled up with zeros; all between them counts as taken away."""

    blocks: Float[Tensor, "blocks size size"]
    columns: int

    @property
    def shrinkage(self) -> float:  # type: ignore[override]
        """The share of the entries off the diagonal that lie between blocks."""
        pairs = self.columns * (self.columns - 1)
        size, last = self.blocks.shape[1], self.columns % self.blocks.shape[1]
        kept = self.columns // size * size * (size - 1) + last * (last - 1)
        return 1 - kept / pairs if pairs else 0.0

    def dense(self) -> Float[Tensor, "columns columns"]:
        matrix: Tensor = torch.block_diag(*self.blocks)
        return matrix[: self.columns, : self.columns]

    def diagonal(self) -> Float[Tensor, " columns"]:
        return self.blocks.diagonal(dim1=1, dim2=2).flatten()[: self.columns]

    def blended(self, other: Curvature, share: float) -> Curvature:
        if isinstance(other, BlockDiagonal) and other.blocks.shape == self.blocks.shape:
            return replace(self, blocks=torch.lerp(self.blocks, other.blocks, share))
        return super().blended(other, share)


class BlockDiagonalEstimator(Estimator):
    """Second moments within blocks of `size` neighbouring columns, such as a group: little noise.

    Little memory too while calibration text flows; a solver that reads all of H puts the whole matrix together, one
    layer at a time.
    """

    name = "block_diagonal"
    produces = BlockDiagonal
    size: PositiveInt = 64

    def state_size(self, columns: int) -> int:
        return -(-columns // self.size) * self.size**2

    def start(self, layer: Layer) -> BlockSums:
        blocks = -(-layer.columns // self.size)
        no_tokens = torch.zeros((), dtype=torch.float64)
        return BlockSums(torch.zeros(blocks, self.size, self.size), layer.columns, no_tokens)

    def update(
        self, state: BlockSums, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]
    ) -> BlockSums:
        sums = state.products.to(x.device)
        blocks = functional.pad(x, (0, -x.shape[1] % self.size)).view(len(x), len(sums), self.size).transpose(0, 1)
        tokens = state.tokens.to(x.device) + token_weight.sum().double()
        return BlockSums(sums + blocks.transpose(1, 2) @ (token_weight[:, None] * blocks), state.columns, tokens)

    def merge(self, state: BlockSums, other: BlockSums) -> BlockSums:
        return BlockSums(state.products + other.products, state.columns, state.tokens + other.tokens)

    def finish(self, state: BlockSums) -> BlockDiagonal:
        return BlockDiagonal(state.products / max(float(state.tokens), 1e-12), state.columns)


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [BlockDiagonalEstimator]
