"""Iteratively reweighted least squares: round, fit scale and offset in closed form, repeat."""

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Layer, Quantized, Solver, hookimpl
from dashq.solving import Descent, Norm, Piece, ScaleAndOffset, alternate, residual_floor, solve_in_pieces
from dashq_plugins.solvers.candidates import PAPER, PAPER_ITERATIONS

PRESET = {"iterations": PAPER_ITERATIONS, "damping": PAPER.damping, "ridge": PAPER.ridge, "p": 2.0}


class IrlsSolver(Solver):
    """Coordinate descent on Σ h |w - s·q - m|^p: codes by rounding, then s and m by weighted least squares.

    Starts from min-max rounding, and goes back to it in the groups where that has the smaller Σ h (w - s·q - m)².
    With `p` below 2 it starts from what p = 2 finds, and goes back to that where it is better in the norm of p, too.
    Reports how many iterations moved a group, on average and at most, and how many groups came to rest.

    - `iterations`: rounds of the alternation at most.
    - `damping`: share of the old scale and offset that each round keeps (0: none).
    - `ridge`: λ in s = Cov(w, q) / (Var(q) + λ).
    - `p`: 2 is the paper; below 2, each round weighs its residuals e with h·|e|^(p - 2), a robust norm.
    - `tolerance`: a group rests when its scale moves by no more than this share of itself, and its zero by no more
      than this share of a code.
    - `preset: paper`: iterations 9, damping 0.5, ridge 0.01, p 2: the paper's settings as reconstructed.
    """

    name = "irls"
    claims = ("never_worse_than_minmax",)
    preset: Literal["paper"] | None = None
    iterations: NonNegativeInt = 9
    damping: float = Field(default=0.0, ge=0, lt=1)
    ridge: NonNegativeFloat = 0.0
    p: float = Field(default=2.0, ge=0.5, le=2)
    tolerance: NonNegativeFloat = 0.0

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: Any) -> Any:
        return PRESET | data if isinstance(data, dict) and data.get("preset") == "paper" else data

    def nanoseconds(self, layer: Layer, size: int, grid: Grid) -> float:
        return 25.0

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        iterations: list[Tensor] = []
        descent = Descent(self.damping, self.ridge, self.tolerance)

        def choose(piece: Piece) -> ScaleAndOffset:
            start = piece.minmax
            scale, zero, rounds = alternate(piece, start[0], piece.zero(*start), self.iterations, descent)
            chosen = piece.best(start, piece.stored(scale, zero))
            if self.p < 2:
                norm = Norm(self.p, residual_floor(start[0]))
                scale, zero, rounds = alternate(piece, scale, zero, self.iterations, descent, norm)
                chosen = _robust(piece, norm, piece.stored(scale, zero), chosen)
            iterations.append(rounds)
            return chosen

        result = solve_in_pieces(weight, curvature, grouping, grid, choose)
        rounds = torch.cat([counts.flatten() for counts in iterations]).float()
        statistics = {
            "iterations_mean": round(float(rounds.mean()), 3),
            "iterations_max": float(rounds.max()),
            "at_rest": round(float((rounds < self.iterations).float().mean()), 4),
        }
        return replace(result, statistics=statistics)


def _robust(
    piece: Piece,
    norm: Norm,
    robust: tuple[Float[Tensor, "1 groups rows"], Float[Tensor, "1 groups rows"]],
    squares: ScaleAndOffset,
) -> ScaleAndOffset:
    """The robust scale and offset where they are no worse than least squares in the norm, nor than min-max in squares.

    Elsewhere those of least squares, `squares`.
    """
    candidates = (robust, (squares[0][None], squares[1][None]), piece.minmax)
    scale, offset = (torch.cat(values) for values in zip(*candidates, strict=True))
    own, squared = piece.norms(scale, offset, norm), piece.norms(scale, offset, Norm(2.0, torch.zeros_like(norm.floor)))
    take = (own[0] <= own[1]) & (squared[0] <= squared[2])
    return torch.where(take, scale[0], scale[1]), torch.where(take, offset[0], offset[1])


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [IrlsSolver]
