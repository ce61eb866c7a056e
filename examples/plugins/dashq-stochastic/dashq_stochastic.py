"""The solver `stochastic`: codes rounded up or down at random, so that no weight is off on average."""

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Layer, Quantized, Solver, hookimpl
from dashq.solving import minmax_parameters, quantized


class StochasticSolver(Solver):
    """Each weight goes to one of its two neighbours, the more likely the nearer.

    One draw is unbiased: the mean of ŵ over all seeds is w. It claims nothing, since
    single rows are often worse than by rounding to the nearest. Of several `draws` each
    row keeps the one with the least (w - ŵ)ᵀ H (w - ŵ).
    """

    name = "stochastic"  # what a recipe asks for
    objective = "rows"  # what the best draw is chosen by
    seed: int = Field(default=0, ge=0, lt=2**63)  # a parameter in the recipe
    draws: PositiveInt = 1

    def nanoseconds(self, layer: Layer, size: int, grid: Grid) -> float:
        return 20.0 * self.draws

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        w = grouping.split(weight)  # [rows, groups, size]
        scale, offset = minmax_parameters(w, grid)  # a weight is scale * code + offset
        # The same input gives the same result: numbers come anew from the recipe's seed.
        generator = torch.Generator().manual_seed(self.seed)
        codes = torch.zeros_like(w, dtype=torch.uint8)
        least = torch.full((len(w),), torch.inf, dtype=torch.float64, device=w.device)
        for _ in range(self.draws):
            shift = torch.rand(w.shape, generator=generator).to(w.device) - 0.5
            # Rounding to the nearest after a shift of up to half a step.
            draw = quantized(w + shift * scale[..., None], scale, offset, grid, grouping)
            error = curvature.row_errors(weight - draw.dequantize())
            codes = torch.where((error < least)[:, None, None], draw.codes, codes)
            least = torch.minimum(error, least)
        return Quantized.of(codes, scale, offset, grouping, grid)


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [StochasticSolver]
