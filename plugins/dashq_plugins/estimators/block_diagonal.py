"""Second moments of the columns within a block, nothing between blocks."""

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional

from dashq import Estimator, Full, Layer, hookimpl


class BlockDiagonalEstimator(Estimator):
    """Second moments within blocks of `size` neighbouring columns, such as a group: little memory, little noise."""

    name = "block_diagonal"
    produces = Full
    size: PositiveInt = 64

    def start(self, layer: Layer) -> tuple[Tensor, Tensor]:
        blocks = -(-layer.columns // self.size)
        return torch.zeros(blocks, self.size, self.size), torch.tensor([layer.columns, 0.0], dtype=torch.float64)

    def update(
        self, state: tuple[Tensor, Tensor], x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]
    ) -> tuple[Tensor, Tensor]:
        sums, counts = (part.to(x.device) for part in state)
        blocks = functional.pad(x, (0, -x.shape[1] % self.size)).view(len(x), len(sums), self.size).transpose(0, 1)
        counts = counts + torch.stack([torch.zeros_like(counts[0]), token_weight.sum().double()])
        return sums + blocks.transpose(1, 2) @ (token_weight[:, None] * blocks), counts

    def merge(self, state: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        counts = torch.stack([state[1][0], state[1][1] + other[1][1]])
        return state[0] + other[0], counts

    def finish(self, state: tuple[Tensor, Tensor]) -> Full:
        columns, tokens = state[1].tolist()
        return Full((torch.block_diag(*state[0]) / max(tokens, 1e-12))[: int(columns), : int(columns)])


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [BlockDiagonalEstimator]
