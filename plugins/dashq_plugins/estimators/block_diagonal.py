"""Second moments of the columns within a block, nothing between blocks."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional

from dashq import Estimator, Full, Layer, hookimpl


class BlockSums(NamedTuple):
    """Sums of products within each block, and the numbers of columns and of tokens."""

    products: Float[Tensor, "blocks size size"]
    columns: int
    tokens: Float[Tensor, ""]


class BlockDiagonalEstimator(Estimator):
    """Second moments within blocks of `size` neighbouring columns, such as a group: little memory, little noise."""

    name = "block_diagonal"
    produces = Full
    size: PositiveInt = 64

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

    def finish(self, state: BlockSums) -> Full:
        matrix = torch.block_diag(*state.products) / max(float(state.tokens), 1e-12)
        return Full(matrix[: state.columns, : state.columns])


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [BlockDiagonalEstimator]
