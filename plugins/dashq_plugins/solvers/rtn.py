"""Round to nearest: scale and offset from each group's smallest and largest weight."""

from jaxtyping import Float
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Layer, Quantized, Solver, hookimpl
from dashq.solving import round_to_nearest


class RoundToNearestSolver(Solver):
    """Min-max rounding, blind to the curvature: the floor that every other solver must beat."""

    name = "rtn"
    claims = ("never_worse_than_minmax",)

    def nanoseconds(self, layer: Layer, size: int, grid: Grid) -> float:
        return 10.0

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        return round_to_nearest(grouping.split(weight), grid, grouping)


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [RoundToNearestSolver]
