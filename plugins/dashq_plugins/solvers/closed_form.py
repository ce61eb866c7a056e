"""The best of a search, of alternations and of min-max rounding: within a fraction of a percent of the optimum."""

from jaxtyping import Float
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Quantized, Solver, hookimpl
from dashq.solving import solve_in_pieces
from dashq_plugins.solvers.candidates import best_candidate


class ClosedFormSolver(Solver):
    """Searches scales and zeros, each with its exact least-squares fit, for the least Σ h (w - s·q - m)².

    In no group worse than min-max rounding, nor than alternations that start there, plain or with the paper's settings:
    those are among its candidates, and what counts is the error with scale, offset and codes as they will be stored.
    """

    name = "closed_form"
    claims = ("never_worse_than_minmax",)

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        return solve_in_pieces(weight, curvature, grouping, grid, best_candidate)


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [ClosedFormSolver]
