"""The alternation of codes with scale and zero descends in its own objective."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Diagonal, Grid, Grouping
from dashq.solving.alternation import RESIDUAL_FLOOR, alternate
from dashq.solving.arithmetic import group_importance
from dashq.solving.pieces import Norm, Piece
from dashq.testing.examples import grids, importances, weights
from tensors import noise

ROWS = 3
SIZE = 12
GROUPING = Grouping(columns=SIZE, size=SIZE)
ANY_WEIGHTS = weights(ROWS, SIZE)
ANY_IMPORTANCES = importances(SIZE)


few = settings(max_examples=25)


def exact(bits: int) -> Grid:
    """A grid in which scales and offsets are not rounded."""
    return Grid(bits=bits, dtype=torch.float32)


@few
@given(ANY_WEIGHTS, ANY_IMPORTANCES, grids(), st.sampled_from([0.5, 1.0, 1.5, 2.0]))
def test_the_alternation_descends_in_its_own_objective(w: Tensor, h: Tensor, grid: Grid, p: float) -> None:
    shares = group_importance(Diagonal(h), GROUPING).T[..., None].double()
    piece = Piece(w.T[:, None].double(), shares, replace(grid, dtype=torch.float32))
    start = torch.full((1, 1, ROWS), 0.5 * float(w.std(1).mean()) + 1e-6, dtype=torch.float64)
    middle, x = torch.full_like(start, float(grid.middle)), piece.w - piece.origin
    floor = (RESIDUAL_FLOOR * start).square() if p < 2 else torch.zeros_like(start)

    def objective(rounds: int) -> Tensor:
        s, z, _ = alternate(piece, start, middle, rounds, norm=Norm(p, floor) if p < 2 else None)
        d = (x / s + z).round().clamp(0, grid.top) - z
        return (piece.h * ((x - s * d).square() + floor) ** (p / 2)).sum(0)

    objectives = [objective(rounds) for rounds in range(6)]
    slack = 1e-9 * (piece.h * (x.square() + floor) ** (p / 2)).sum(0)
    assert all((later <= earlier + slack).all() for earlier, later in pairwise(objectives))


@pytest.mark.parametrize("p", [1.0, 1.5])
def test_a_robust_norm_reaches_less_of_itself_than_squares_do(p: float) -> None:
    w = noise(0, 256, 64)
    w[:, ::16] *= 6  # outliers
    piece = Piece(w.T[:, None].double(), torch.full((64, 1, 1), 1 / 64, dtype=torch.float64), exact(3))
    x = piece.w - piece.origin
    start = piece.minmax[0].double(), piece.zero(*piece.minmax).double()
    floor = (RESIDUAL_FLOOR * start[0]).square()

    def objective(power: float) -> float:
        s, z, _ = alternate(piece, *start, 30, norm=Norm(power, floor) if power < 2 else None)
        d = (x / s + z).round().clamp(0, 7) - z
        return float((((x - s * d).square() + floor) ** (p / 2)).mean())

    assert objective(p) < objective(2.0)
