"""Iteratively reweighted least squares: round, fit scale and offset in closed form, repeat."""

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Quantized, Solver, hookimpl
from dashq.alternation import alternate
from dashq.pieces import Choice, Piece, solve_in_pieces

# Reconstructed by independent readers of arXiv 2604.13806; not checked against its text.
PAPER = {"iterations": 9, "damping": 0.5, "ridge": 1e-2, "p": 2.0}


class IrlsSolver(Solver):
    """Coordinate descent on Σ h |w - s·q - m|^p: codes by rounding, then s and m by weighted least squares.

    Starts from min-max rounding, and goes back to it in the groups where that has the smaller Σ h (w - s·q - m)².
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
    preset: Literal["paper"] | None = None
    iterations: NonNegativeInt = 9
    damping: float = Field(default=0.0, ge=0, lt=1)
    ridge: NonNegativeFloat = 0.0
    p: float = Field(default=2.0, ge=0.5, le=2)
    tolerance: NonNegativeFloat = 0.0

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, data: Any) -> Any:
        return PAPER | data if isinstance(data, dict) and data.get("preset") == "paper" else data

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        iterations: list[Tensor] = []

        def choose(piece: Piece) -> Choice:
            start = piece.minmax
            scale, zero, rounds = alternate(
                piece, start[0], piece.zero(*start), self.iterations, self.damping, self.ridge, self.p, self.tolerance
            )
            iterations.append(rounds)
            return piece.best(start, piece.stored(scale, zero))

        result = solve_in_pieces(weight, curvature, grouping, grid, choose)
        rounds = torch.cat(iterations).float()
        statistics = {
            "iterations_mean": round(float(rounds.mean()), 3),
            "iterations_max": float(rounds.max()),
            "at_rest": round(float((rounds < self.iterations).float().mean()), 4),
        }
        return replace(result, statistics=statistics)


@hookimpl
def dashq_solvers() -> list[type[Solver]]:
    return [IrlsSolver]
