"""Error feedback under the full curvature, on the grid that is best under its diagonal; then descent."""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeInt
from torch import Tensor

from dashq import Coupled, Curvature, Grid, Grouping, Layer, PlanError, Quantized, Solver, hookimpl
from dashq.solving import round_to_nearest, solve_in_pieces
from dashq_plugins.solvers.block_search import search_blocks, search_nanoseconds
from dashq_plugins.solvers.candidates import best_candidate
from dashq_plugins.solvers.feedback.descent import descend
from dashq_plugins.solvers.feedback.error_feedback import Succession, feed_back
from dashq_plugins.solvers.feedback.joint import Joint, in_group_order, rows_from


class Nanoseconds(NamedTuple):
    """Measured on one core: of each weight, of each column, and of each product of a weight with an entry of H.

    In super-blocks a weight takes longer by the fit of their units, and with a codebook by the choice of its patterns.
    """

    weight: float
    column: float
    product: float
    units: float
    patterns: float


NANOSECONDS = Nanoseconds(120.0, 220_000.0, 0.35, 500.0, 9000.0)


class FeedbackSolver(Solver):
    """Lowers (w - ŵ)ᵀ H (w - ŵ) of every row: never above min-max rounding, or what a search under H's diagonal finds.

    Scales and offsets are those of that search. On them codes are chosen with error feedback, in order of decreasing
    importance; then `sweeps` of coordinate descent over scales, offsets and codes, in super-blocks over units,
    multiples and codes.

    - `damping`: added to the diagonal of H, as a share of its mean; raised where H cannot be factorized.
    - `sweeps`: of the descent at most; 0 leaves scales and offsets as the search found them.
    """

    name = "feedback"
    claims = ("never_worse_than_minmax",)
    needs = Coupled
    objective = "rows"
    supports_super_blocks: ClassVar[bool] = True
    supports_codebooks: ClassVar[bool] = True
    damping: float = Field(default=0.01, gt=0, le=1)
    sweeps: NonNegativeInt = 3

    def check(self, size: int, grid: Grid) -> None:
        if grid.super_blocks and size != grid.super_blocks.size:
            raise PlanError(
                f"solver 'feedback' needs groups of {grid.super_blocks.size} in super-blocks of {grid.bits} bits, "
                f"not of {size}"
            )

    def nanoseconds(self, layer: Layer, size: int, grid: Grid) -> float:
        # Columns take their turns, whatever the number of rows, and each weight is multiplied with all of H.
        turns = NANOSECONDS.weight + NANOSECONDS.column / layer.rows + NANOSECONDS.product * layer.columns
        if grid.super_blocks is None:
            return turns
        patterns = grid.codebook is not None and not grid.codebook.is_scalar
        return turns + search_nanoseconds(grid) + (NANOSECONDS.patterns if patterns else NANOSECONDS.units)

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        return self.prepared(curvature, grouping, grid)(weight)

    def prepared(
        self, curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Callable[[Float[Tensor, "rows columns"]], Quantized]:
        h = in_group_order(curvature, grouping, self.damping)
        turns = Succession.of(h, grid)

        def solve(weight: Float[Tensor, "rows columns"]) -> Quantized:
            if grid.super_blocks:
                start = search_blocks(weight, curvature, grouping, grid)
            else:
                start = solve_in_pieces(weight, curvature, grouping, grid, best_candidate)
            joint = Joint.of(weight, h, start)
            before = joint.objective()
            if turns:
                feed_back(joint, turns)
            after = descend(joint, self.sweeps)
            result = rows_from(joint, start, after < before)
            # What is best under the diagonal can be worse than min-max rounding under all of H, if seldom.
            minmax = joint.otherwise(round_to_nearest(grouping.split(weight), grid, grouping))
            better = minmax.objective() < after.minimum(before)
            if better.any():
                result = rows_from(minmax, result, better)
            least, most = (float(values.sum(dtype=torch.float64)) for values in (after.minimum(before), before))
            ratio = least / most if most > 0 else 1.0
            damping = self.damping + (turns.damping if turns else 0.0)
            fallbacks = () if turns else ("H could not be factorized: no error feedback",)
            return replace(result, statistics={"damping": damping, "objective": ratio}, fallbacks=fallbacks)

        return solve


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [FeedbackSolver]
