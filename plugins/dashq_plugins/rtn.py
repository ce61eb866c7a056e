"""Round to nearest: scale and offset from each group's smallest and largest weight."""

from jaxtyping import Float
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Quantized, Solver, hookimpl
from dashq.pieces import Choice, Piece, solve_in_pieces


class RoundToNearestSolver(Solver):
    """Min-max rounding, blind to the curvature: the floor that every other solver must beat."""

    name = "rtn"

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        return solve_in_pieces(weight, curvature, grouping, grid, _choose)


def _choose(piece: Piece) -> Choice:
    scale, offset = piece.minmax
    return scale[0], offset[0]


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [RoundToNearestSolver]
