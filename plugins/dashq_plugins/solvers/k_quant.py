"""The solver for super-blocks under a diagonal curvature."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Layer, PlanError, Quantized, Solver, hookimpl
from dashq_plugins.solvers.block_search import search_blocks, search_nanoseconds


class KQuantSolver(Solver):
    """Searches units, multiples and codes of super-blocks for the least Σ h (w - ŵ)², all as they will be stored.

    Several units are tried; from the best, steps alternate that never raise the error: the units by least squares for
    fixed codes, then each group's multiples among their neighbours, with codes rounded anew.
    """

    name = "k_quant"
    claims = ("never_worse_than_minmax",)
    supports_super_blocks: ClassVar[bool] = True
    supports_codebooks: ClassVar[bool] = True

    def check(self, size: int, grid: Grid) -> None:
        if grid.super_blocks is None:
            raise PlanError("solver 'k_quant' works on super-blocks alone, and the format has none at these bits")
        if size != grid.super_blocks.size:
            raise PlanError(
                f"solver 'k_quant' needs groups of {grid.super_blocks.size} at {grid.bits} bits, not of {size}"
            )

    def nanoseconds(self, layer: Layer, size: int, grid: Grid) -> float:
        return search_nanoseconds(grid)

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        return search_blocks(weight, curvature, grouping, grid)


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [KQuantSolver]
