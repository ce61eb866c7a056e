"""The global optimum of every group: slow, and what the other solvers are measured by."""

from jaxtyping import Float
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Layer, PlanError, Quantized, Solver, hookimpl
from dashq.solving import Piece, ScaleAndOffset, events, find_optimum, solve_in_pieces
from dashq_plugins.solvers.candidates import stored_candidates

MOST_EVENTS = 1 << 20  # of one group: a good second
NANOSECONDS = 150.0  # of one event, in large batches
SIZES = (256, 192, 128, 96, 64, 32, 16, 8)  # of groups, to advise


class ExactSolver(Solver):
    """The global optimum of Σ h (w - s·q - m)² in each group, by the arrangement sweep.

    The sweep is exact for scales and offsets of real size. They are then stored in the grid's type, and where that
    costs more than a search finds, the search has its way. Time grows with the square of the group size and of the
    number of codes: for 2 bits in groups of up to 128, and for patience at 3 bits.
    """

    name = "exact"
    claims = ("never_worse_than_minmax",)

    def check(self, size: int, grid: Grid) -> None:
        if events(size, grid) > MOST_EVENTS:
            possible = [size for size in SIZES if events(size, grid) <= MOST_EVENTS]
            advice = f"it can take groups of up to {possible[0]}" if possible else "take fewer bits"
            raise PlanError(
                f"solver 'exact' would visit {events(size, grid):,} codes in each group of {size} at {grid.bits} bits, "
                f"but takes at most {MOST_EVENTS:,}: {advice}"
            )

    def nanoseconds(self, layer: Layer, size: int, grid: Grid) -> float:
        return NANOSECONDS * events(size, grid) / size

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        return solve_in_pieces(weight, curvature, grouping, grid, _choose)


def _choose(piece: Piece) -> ScaleAndOffset:
    shape = piece.minmax[0].shape
    w, h = (values.expand_as(piece.w).flatten(1).T for values in (piece.w, piece.h))
    best = find_optimum(w, h, piece.grid)
    scale, offset = best.scale.float().view(shape), best.offset.float().view(shape)
    return piece.best(*stored_candidates(piece), piece.stored(scale, piece.zero(scale, offset)))


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [ExactSolver]
