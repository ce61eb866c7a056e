"""The arrangement sweep finds the global optimum: no vector of codes does better, on any kind of grid."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Diagonal, Grid, Grouping, PlanError
from dashq.solving.arithmetic import group_importance
from dashq.solving.optimum import events, find_optimum
from dashq.testing.examples import grids, importances, weights
from dashq_plugins.solvers.exact import MOST_EVENTS, ExactSolver
from recipes import REGISTRY

few = settings(max_examples=40)
SMALL = st.sampled_from([(1, 6), (2, 5), (3, 3)])  # bits and columns of which all codes can be tried


def shares(h: Tensor, rows: int) -> Tensor:
    """Importances as solvers see them, [rows size], in float64."""
    size = len(h)
    return group_importance(Diagonal(h), Grouping(columns=size, size=size)).double().expand(rows, size)


def least_of_all_codes(w: Tensor, h: Tensor, grid: Grid) -> Tensor:
    """The least Σ h (w - ŵ)² of each row over every vector of codes, each with its least-squares fit."""
    codes = torch.tensor(list(itertools.product(range(grid.top + 1), repeat=w.shape[1])), dtype=torch.float64)
    if grid.zero == "real":
        x = w - (h * w).sum(1, keepdim=True)
        d = codes[:, None] - (codes @ h.T)[..., None]  # [codes rows size], less their mean
        zeros = [0]
    else:
        x, d = w, codes[:, None].expand(-1, len(w), -1)
        zeros = [grid.middle] if grid.zero == "symmetric" else list(range(grid.top + 1))
    error = (h * x * x).sum(1)
    for zero in zeros:
        c = d - zero
        square, product = (h * c * c).sum(2), (h * c * x).sum(2)
        valid = (square > 1e-12) & ((product > 0) | (grid.zero == "real") | grid.negative_scales)
        gain = torch.where(valid, product.square() / square.clamp_min(1e-300), 0.0)
        error = torch.minimum(error, ((h * x * x).sum(1) - gain).amin(0))
    return error


@st.composite
def groups(draw: st.DrawFn) -> tuple[Tensor, Tensor, Grid]:
    bits, size = draw(SMALL)
    grid = draw(grids())
    w = draw(weights(2, size)).double()
    if draw(st.booleans()):
        w = w.round()  # ties among the weights, and weights of 0
    return w, shares(draw(importances(size)), 2), replace(grid, bits=bits)


@few
@given(groups())
def test_no_codes_do_better(example: tuple[Tensor, Tensor, Grid]) -> None:
    w, h, grid = example
    error, expected = find_optimum(w, h, grid).error, least_of_all_codes(w, h, grid)
    scale = (h * w * w).sum(1)
    torch.testing.assert_close(error / scale.clamp_min(1e-300), expected / scale.clamp_min(1e-300), rtol=0, atol=1e-9)


@few
@given(groups())
def test_its_scale_and_offset_reach_its_error(example: tuple[Tensor, Tensor, Grid]) -> None:
    w, h, grid = example
    best = find_optimum(w, h, grid)
    scale, offset = best.scale[:, None], best.offset[:, None]
    codes = ((w - offset) / scale).round().clamp(0, grid.top)
    reached = (h * (w - scale * codes - offset).square()).sum(1)
    assert bool((reached <= best.error + 1e-9 * (h * w * w).sum(1)).all())


@few
@given(groups())
def test_its_zero_and_scale_lie_on_the_grid(example: tuple[Tensor, Tensor, Grid]) -> None:
    w, h, grid = example
    best = find_optimum(w, h, grid)
    assert bool((best.scale != 0).all() if grid.negative_scales else (best.scale > 0).all())
    if grid.zero != "real":
        zero = (-best.offset / best.scale).round()
        torch.testing.assert_close(best.offset, -best.scale * zero)
        assert bool(((zero == grid.middle) | (grid.zero == "integer")).all())


@pytest.mark.parametrize("name", ["rtn", "irls", "closed_form", "exact"])
@given(weights(3, 16), importances(16), grids().filter(lambda grid: grid.bits <= 3))
@settings(max_examples=10)
def test_every_solver_stays_above_it(name: str, w: Tensor, h: Tensor, grid: Grid) -> None:
    quantized = REGISTRY.solvers[name]().solve(w, Diagonal(h), Grouping(columns=16, size=16), grid)
    v = shares(h, 3)
    error = (v * (w.double() - quantized.dequantize().double()).square()).sum(1)
    rounding = 1e-6 * (v * w * w).sum(1)  # of dequantized weights, which are float32
    assert bool((find_optimum(w, v, grid).error <= error + rounding).all())


@given(weights(2, 8), importances(8), st.integers(-3, 3), st.integers(0, 999))
@settings(max_examples=20)
def test_it_does_not_depend_on_scale_shift_or_order(w: Tensor, h: Tensor, power: int, seed: int) -> None:
    grid, v = Grid(bits=2, dtype=torch.float32), shares(h, 2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    moved = (2.0**power * w.double() + 3)[:, order]
    there, here = find_optimum(moved, v[:, order], grid).error, find_optimum(w, v, grid).error * 4.0**power
    scale = (v[:, order] * moved.square()).sum(1)
    torch.testing.assert_close(there / scale, here / scale, rtol=0, atol=1e-9)


def test_the_cost_grows_with_the_square_of_groups_and_codes() -> None:
    two, three = Grid(bits=2, dtype=torch.float16), Grid(bits=3, dtype=torch.float16)
    assert events(128, two) == 4 * events(64, two)
    assert events(64, three) == 7 * events(64, two)
    assert events(128, Grid(bits=2, dtype=torch.float16, zero="integer")) < events(32, two)


def test_groups_of_128_at_2_bits_are_taken_and_what_would_take_too_long_is_refused() -> None:
    ExactSolver().check(128, Grid(bits=2, dtype=torch.float16))
    ExactSolver().check(128, Grid(bits=3, dtype=torch.float16))
    big = Grid(bits=4, dtype=torch.float16)
    assert events(128, big) > MOST_EVENTS
    with pytest.raises(PlanError, match=r"group of 128 at 4 bits.*up to 64"):
        ExactSolver().check(128, big)
