"""The search chooses units, multiples and codes together, and leaves nothing that one step would make better."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Diagonal, Grid, Grouping, Quantized
from dashq.solving.arithmetic import round_to_nearest
from dashq.solving.super_blocks import factor
from dashq.testing.comparison import equal
from dashq.testing.examples import Problem, block_problems
from dashq_plugins.solvers import block_search
from dashq_plugins.solvers.block_search import search_blocks
from recipes import REGISTRY
from tensors import noise

SUPER_BLOCKS = tuple(REGISTRY.serializers["gguf"]().grid(bits) for bits in (2, 3, 4))
few = settings(max_examples=10)
grids = pytest.mark.parametrize("grid", SUPER_BLOCKS, ids=lambda grid: f"{grid.bits} bits")


def problem_of(grid: Grid, rows: int = 12, blocks: int = 2) -> Problem:
    assert grid.super_blocks
    columns = blocks * grid.super_blocks.columns
    grouping = Grouping(columns=columns, size=grid.super_blocks.size)
    return Problem(noise(0, rows, columns), Diagonal((1.5 * noise(1, columns)).exp()), grouping, grid)


def solve(problem: Problem, factor: float = 1.0) -> Quantized:
    return search_blocks(factor * problem.weight, problem.curvature, problem.grouping, problem.grid)


def error(problem: Problem, q: Quantized) -> Tensor:
    """Σ h (w - ŵ)² of each row."""
    h = problem.curvature.diagonal().double()
    return (h * (problem.weight.double() - q.dequantize().double()).square()).sum(1)


@few
@given(block_problems())
def test_its_scales_and_offsets_can_be_written(problem: Problem) -> None:
    q, blocks = solve(problem), problem.grid.super_blocks
    assert blocks
    for values in (q.scale,) if blocks.signed else (q.scale, -q.offset):
        parts = values.unflatten(1, (-1, blocks.groups)).flatten(0, 1)
        unit, multiple = factor(parts, blocks, blocks.signed)
        assert (unit.float() * multiple).equal(parts)
    if blocks.signed:
        assert q.offset.equal(-q.scale * problem.grid.middle)


@grids
def test_it_is_far_better_than_min_max_rounding(grid: Grid) -> None:
    problem = problem_of(grid)
    minmax = round_to_nearest(problem.grouping.split(problem.weight), grid, problem.grouping)
    assert float(error(problem, solve(problem)).sum() / error(problem, minmax).sum()) < 0.75


@few
@given(block_problems())
def test_every_code_is_the_nearest(problem: Problem) -> None:
    q = solve(problem)
    values = q.scale[..., None] * torch.arange(problem.grid.top + 1) + q.offset[..., None]
    w = problem.grouping.split(problem.weight)
    reached = (w - (q.scale[..., None] * q.codes + q.offset[..., None])).abs()
    nearest = (w[..., None] - values[:, :, None]).abs().amin(-1)
    assert bool((reached <= nearest + 1e-6 * (w.abs() + values.abs().amax(-1, keepdim=True))).all())


@grids
def test_no_neighbouring_multiple_would_be_better(grid: Grid) -> None:
    problem, blocks = problem_of(grid), grid.super_blocks
    assert blocks
    q = solve(problem)
    w, h = (
        problem.grouping.split(problem.weight).double(),
        problem.grouping.split_importance(problem.curvature.diagonal()),
    )
    unit, multiple = factor(q.scale.unflatten(1, (-1, blocks.groups)).flatten(0, 1), blocks, blocks.signed)

    def errors(scale: Tensor, offset: Tensor) -> Tensor:
        s, m = scale.double()[..., None], offset.double()[..., None]
        codes = ((w - m) / s).round().clamp(0, grid.top)
        return (h * (w - s * codes - m).square()).sum(-1)

    least = errors(q.scale, q.offset)
    for step in (-1, 1):
        moved = (multiple + step).clamp(-blocks.top - 1 if blocks.signed else 1, blocks.top)
        moved = torch.where(moved == 0, multiple, moved)
        scale = (unit.float() * moved).view_as(q.scale)
        there = errors(scale, -scale * grid.middle if blocks.signed else q.offset)
        assert bool((there >= least * (1 - 1e-4)).all())


@grids
def test_a_row_is_solved_alike_alone_and_among_others(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(grid, rows=4, blocks=1)
    together = solve(problem)
    monkeypatch.setattr(block_search, "WEIGHTS", 1)
    apart = solve(problem)
    assert equal(apart, together)
    some = Problem(problem.weight[1:3], problem.curvature, problem.grouping, grid)
    assert solve(some).codes.equal(together.codes[1:3])


@grids
@given(power=st.integers(-6, 6))
@settings(max_examples=6)
def test_weights_of_another_scale_give_the_same_codes(grid: Grid, power: int) -> None:
    problem = problem_of(grid, rows=2, blocks=1)
    plain, scaled = solve(problem), solve(problem, 2.0**power)
    assert scaled.codes.equal(plain.codes)
    assert scaled.scale.equal(2.0**power * plain.scale)
    assert scaled.offset.equal(2.0**power * plain.offset)


@grids
def test_no_importance_at_all_is_as_good_as_flat(grid: Grid) -> None:
    problem = problem_of(grid, rows=2)
    columns = problem.weight.shape[1]
    none, flat = (
        search_blocks(problem.weight, Diagonal(h), problem.grouping, grid)
        for h in (torch.zeros(columns), torch.ones(columns))
    )
    assert equal(none, flat)


def test_groups_that_matter_more_are_met_more_closely() -> None:
    grid = SUPER_BLOCKS[0]
    problem = problem_of(grid, rows=40, blocks=1)
    h = torch.ones(256)
    h[:16] = 1000  # the first group has a scale that suits it, and all others the units that are left
    weighted = search_blocks(problem.weight, Diagonal(h), problem.grouping, grid)
    flat = search_blocks(problem.weight, Diagonal(torch.ones(256)), problem.grouping, grid)
    first = [(problem.weight - q.dequantize())[:, :16].square().sum() for q in (weighted, flat)]
    rest = [(problem.weight - q.dequantize())[:, 16:].square().sum() for q in (weighted, flat)]
    assert first[0] < first[1]
    assert rest[0] > rest[1]
