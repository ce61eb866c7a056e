"""The global optimum of every group: slow, and what the other solvers are measured by."""

from jaxtyping import Float
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Quantized, Solver, hookimpl
from dashq.optimum import optimum
from dashq.pieces import Choice, Piece, solve_in_pieces
from dashq.search import search


class ExactSolver(Solver):
    """The global optimum of Σ h (w - s·q - m)² in each group, by the arrangement sweep.

    The sweep is exact for scales and offsets of real size. They are then stored in the grid's type, and where that
    costs more than a search finds, the search has its way. Time grows with the square of the group size and of the
    number of codes: for 2 bits in groups of up to 128, and for patience at 3 bits.
    """

    name = "exact"

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        return solve_in_pieces(weight, curvature, grouping, grid, _choose)


def _choose(piece: Piece) -> Choice:
    best = optimum(piece.w, piece.h.expand_as(piece.w), piece.grid)
    scale = best.scale.float()[:, None]
    zero = (piece.origin - best.offset.float()[:, None]) / scale
    return piece.best(*(piece.stored(*found) for found in ((scale, zero), search(piece), piece.minmax)))


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [ExactSolver]
