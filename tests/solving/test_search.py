"""A search over scales and zeros ends close to the optimum of every group, and never behind where it could start."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Grid
from dashq.data import Zero
from dashq.solving.optimum import find_optimum
from dashq.solving.pieces import Piece
from dashq.solving.search import HIGHEST_SHARE, lowest_share, search_scales
from dashq.testing.examples import grids, importances, weights
from tensors import noise

SIZE = 16
few = settings(max_examples=25)


def piece_of(w: Tensor, h: Tensor, grid: Grid) -> Piece:
    """Rows of one group each, with importances that sum to 1 and are never 0."""
    shares = h / h.mean() + 1e-3 if h.any() else torch.ones_like(h)
    return Piece(w.T[:, None].contiguous(), (shares / shares.sum())[:, None, None], grid)


def error(piece: Piece, scale: Tensor, zero: Tensor) -> Tensor:
    """Σ h (x - scale · (code - zero))² in each row, in float64."""
    x, s, z = (value.double() for value in (piece.w - piece.origin, scale, zero))
    codes = (x / s + z).round().clamp(0, piece.grid.top)
    return (piece.h.double() * (x - s * (codes - z)).square()).sum(0).flatten()


@few
@given(weights(3, SIZE), importances(SIZE), grids())
def test_scales_and_zeros_are_of_the_kind_that_the_grid_has(w: Tensor, h: Tensor, grid: Grid) -> None:
    scale, zero = search_scales(piece_of(w, h, grid))
    assert bool(scale.isfinite().all())
    assert bool(zero.isfinite().all())
    assert bool((scale != 0).all() if grid.negative_scales else (scale > 0).all())
    if grid.zero == "symmetric":
        assert bool((zero == grid.middle).all())
    elif grid.zero == "integer":
        assert zero.equal(zero.round())
        assert bool(((zero >= 0) & (zero <= grid.top)).all())


@pytest.mark.parametrize("zero", ["real", "integer", "symmetric"])
@pytest.mark.parametrize("negative_scales", [False, True])
@pytest.mark.parametrize("importance", ["flat", "spiky"])
def test_it_ends_close_to_the_optimum(zero: Zero, negative_scales: bool, importance: str) -> None:
    grid = Grid(bits=2, dtype=torch.float32, zero=zero, negative_scales=negative_scales and zero == "symmetric")
    w, h = noise(0, 200, 32), torch.ones(32) if importance == "flat" else (1.5 * noise(1, 32)).exp()
    piece = piece_of(w, h, grid)
    reached = error(piece, *search_scales(piece))
    least = find_optimum(w.double(), piece.h.flatten().double().expand(200, 32), grid).error
    assert bool((reached >= least * (1 - 1e-4)).all())
    assert float(reached.sum() / least.sum()) < 1.01


@few
@given(st.integers(0, 999), st.integers(-12, 12), grids())
def test_weights_of_another_scale_have_the_scales_and_the_same_zeros(seed: int, power: int, grid: Grid) -> None:
    w, h, grid = noise(seed, 3, SIZE), noise(seed + 1, SIZE).exp(), replace(grid, dtype=torch.float32)
    (scale, zero), (scaled, same) = (search_scales(piece_of(f * w, h, grid)) for f in (1.0, 2.0**power))
    assert scaled.equal(2.0**power * scale)
    assert same.equal(zero)


def test_a_lopsided_grid_is_turned_round_where_the_format_can() -> None:
    w = torch.tensor([[2.0, 1.0, 0.0, -1.0]])  # the codes 0 to 3 stand for -2 to 1
    grid = Grid(bits=2, dtype=torch.float32, zero="symmetric")
    turned = replace(grid, negative_scales=True)
    plain, best = (piece_of(w, torch.ones(4), kind) for kind in (grid, turned))
    assert error(best, *search_scales(best)).item() < 1e-12
    assert search_scales(best)[0].item() == pytest.approx(-1)
    assert error(plain, *search_scales(plain)).item() > 0.01


def test_the_lowest_share_of_the_range_grows_with_the_codes_and_stays_below_the_highest() -> None:
    shares = [lowest_share((1 << bits) - 1) for bits in range(1, 9)]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] < HIGHEST_SHARE
