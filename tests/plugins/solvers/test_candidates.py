"""Solvers under a diagonal choose from scales and offsets that a file can hold, min-max rounding among them."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from dashq import Grid
from dashq.solving import Piece
from dashq.solving.alternation import Descent, alternate
from dashq.solving.stored_values import store
from dashq.testing.examples import grids, importances, weights
from dashq_plugins.solvers.candidates import PAPER_ITERATIONS, best_candidate, stored_candidates
from tensors import noise

SIZE = 16
few = settings(max_examples=25)


def piece_of(w: Tensor, h: Tensor, grid: Grid) -> Piece:
    """Rows of one group each, with importances that sum to 1 and are never 0."""
    shares = h / h.mean() + 1e-3 if h.any() else torch.ones_like(h)
    return Piece(w.T[:, None].contiguous(), (shares / shares.sum())[:, None, None], grid)


@few
@given(weights(3, SIZE), importances(SIZE), grids())
def test_every_candidate_is_one_that_a_file_can_hold_and_the_first_is_min_max_rounding(
    w: Tensor, h: Tensor, grid: Grid
) -> None:
    piece = piece_of(w, h, grid)
    candidates = stored_candidates(piece)
    assert all(one.equal(other) for one, other in zip(candidates[0], piece.minmax, strict=True))
    for scale, offset in candidates:
        stored = store(scale, offset, grid)
        assert stored[0].equal(scale)
        assert stored[1].equal(offset)


@few
@given(weights(3, SIZE), importances(SIZE), grids())
def test_an_undamped_alternation_from_min_max_rounding_is_among_the_candidates(
    w: Tensor, h: Tensor, grid: Grid
) -> None:
    piece = piece_of(w, h, grid)
    scale, offset = piece.minmax
    expected = piece.stored(*alternate(piece, scale, piece.zero(scale, offset), PAPER_ITERATIONS, Descent())[:2])
    assert any(scale.equal(expected[0]) and offset.equal(expected[1]) for scale, offset in stored_candidates(piece))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_best_candidate_of_each_row_has_the_least_error(bits: int) -> None:
    grid = Grid(bits=bits, dtype=torch.float16)
    piece = piece_of(noise(0, 50, SIZE), noise(1, SIZE).exp(), grid)

    def errors(scale: Tensor, offset: Tensor) -> Tensor:
        codes = ((piece.w - offset) / scale).round().clamp(0, grid.top)
        return (piece.h * (piece.w - scale * codes - offset).square()).sum(0).flatten()

    least = torch.stack([errors(*candidate) for candidate in stored_candidates(piece)]).amin(0)
    torch.testing.assert_close(errors(*best_candidate(piece)), least)
