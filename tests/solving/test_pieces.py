"""A weight is solved in pieces that cover it, and what is solved does not depend on how they are cut."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Diagonal, Grid, Grouping, Quantized
from dashq.solving import pieces
from dashq.solving.arithmetic import group_importance, round_to_nearest
from dashq.solving.pieces import Norm, Piece, ScaleAndOffset, solve_in_pieces, weights_in_a_piece
from dashq.solving.stored_values import store
from dashq.testing.comparison import equal
from dashq.testing.examples import Problem, problems
from tensors import noise

few = settings(max_examples=40)
CANDIDATES = 4


def solved(problem: Problem, in_a_piece: int = 1 << 14) -> tuple[Quantized, list[Piece]]:
    """Min-max rounding in pieces of at most so many weights, and the pieces."""
    seen: list[Piece] = []

    def choose(piece: Piece) -> ScaleAndOffset:
        seen.append(replace(piece, w=piece.w.clone()))  # the next piece lies in the same memory
        scale, offset = piece.minmax
        return scale[0], offset[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pieces.WEIGHTS, "eager", in_a_piece)
        quantized = solve_in_pieces(problem.weight, problem.curvature, problem.grouping, problem.grid, choose)
    return quantized, seen


def whole(problem: Problem) -> Piece:
    """The problem as one piece."""
    w, h = problem.grouping.split(problem.weight), group_importance(problem.curvature, problem.grouping)
    return Piece(w.permute(2, 1, 0).contiguous(), h.T[..., None], problem.grid)


@few
@given(problems(), st.sampled_from([1, 7, 64, 1 << 14]))
def test_what_is_chosen_for_each_piece_is_what_the_layer_is_rounded_with(problem: Problem, in_a_piece: int) -> None:
    expected = round_to_nearest(problem.grouping.split(problem.weight), problem.grid, problem.grouping)
    assert equal(solved(problem, in_a_piece)[0], expected)


@few
@given(problems(), st.sampled_from([1, 7, 64, 1 << 14]))
def test_the_pieces_hold_every_weight_once_and_no_more_of_them_than_they_may(problem: Problem, in_a_piece: int) -> None:
    size = problem.grouping.size
    _, parts = solved(problem, in_a_piece)
    every = whole(problem)
    rows = torch.cat([part.w.flatten() for part in parts]).sort().values
    assert rows.equal(every.w.flatten().sort().values)
    most = max(size, min(in_a_piece, weights_in_a_piece(problem.weight, size, compiled=False)))
    assert max(part.w.numel() for part in parts) <= most


@few
@given(problems(), st.sampled_from([1, 7, 1 << 14]))
def test_the_importances_of_a_piece_are_its_columns_own_and_sum_to_one(problem: Problem, in_a_piece: int) -> None:
    h = group_importance(problem.curvature, problem.grouping)
    for part in solved(problem, in_a_piece)[1]:
        own = part.h[..., 0].T
        torch.testing.assert_close(own.sum(1), torch.ones(len(own)))
        assert all(bool((row == h).all(1).any()) for row in own)


def test_the_rows_of_a_column_lie_beside_one_another() -> None:
    problem = Problem(noise(0, 40, 64), Diagonal(torch.ones(64)), Grouping(columns=64, size=16), GRID)
    strides: list[int] = []

    def choose(piece: Piece) -> ScaleAndOffset:
        strides.append(piece.w.stride(-1))
        return piece.minmax[0][0], piece.minmax[1][0]

    solve_in_pieces(problem.weight, problem.curvature, problem.grouping, problem.grid, choose)
    assert set(strides) == {1}


GRID = Grid(bits=2, dtype=torch.float16)


@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 300), st.integers(1, 1 << 21))
def test_pieces_are_as_few_and_as_even_as_their_size_allows(rows: int, groups: int, size: int, weights: int) -> None:
    some_rows, some_groups = pieces._extent(rows, Grouping(columns=groups * size, size=size), weights)
    assert 1 <= some_rows <= rows
    assert 1 <= some_groups <= groups
    assert some_rows * some_groups * size <= max(weights, size)
    for part, total in ((some_rows, rows), (some_groups, groups)):
        number = -(-total // part)
        assert part - (total - (number - 1) * part) < number  # the last part lacks less than one of each other


@pytest.mark.parametrize("compiled", [False, True])
@given(rows=st.integers(1, 64), columns=st.integers(1, 64), size=st.integers(1, 64))
def test_a_piece_takes_less_memory_than_half_of_its_layer(compiled: bool, rows: int, columns: int, size: int) -> None:
    weights = weights_in_a_piece(torch.empty(rows, columns), size, compiled)
    assert 1 <= weights <= max(1, rows * columns // 2)


@few
@given(problems())
def test_a_piece_knows_its_range_and_is_centred_only_where_zeros_are_real(problem: Problem) -> None:
    piece = whole(problem)
    low, high = piece.range
    assert low.equal(piece.w.amin(0, keepdim=True))
    assert high.equal(piece.w.amax(0, keepdim=True))
    mean = (piece.h.double() * piece.w.double()).sum(0, keepdim=True).float()
    expected = mean if problem.grid.zero == "real" else torch.zeros_like(mean)
    torch.testing.assert_close(piece.origin, expected, rtol=1e-5, atol=1e-6 * float(piece.w.abs().max()))
    tensors = piece.tensors
    left = (piece.h.double() * (piece.w.double() - piece.origin.double())).sum(0, keepdim=True).float()
    torch.testing.assert_close(tensors.mean, left, rtol=1e-4, atol=1e-6 * float(piece.w.abs().max()))


def candidates(piece: Piece, seed: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros about those of min-max rounding, [candidates groups rows]."""
    scale, offset = piece.minmax
    shape = CANDIDATES, *scale.shape[1:]
    scales = scale * (0.3 + 1.5 * noise(seed, *shape).sigmoid())
    zeros = (piece.zero(scale, offset) + noise(seed + 1, *shape)).clamp(0, piece.grid.top)
    if piece.grid.zero != "real":
        zeros = torch.full_like(zeros, piece.grid.middle) if piece.grid.zero == "symmetric" else zeros.round()
    return scales, zeros


@few
@given(problems(), st.integers(0, 999))
def test_what_is_stored_lies_on_the_grid_and_keeps_the_zero(problem: Problem, seed: int) -> None:
    piece = whole(problem)
    scales, zeros = candidates(piece, seed)
    scale, offset = piece.stored(scales, zeros)
    assert all(one.equal(other) for one, other in zip(store(scale, offset, problem.grid), (scale, offset), strict=True))
    if problem.grid.zero != "real":
        assert piece.zero(scale, offset).equal(zeros)
    else:  # the offset belongs to the stored scale, and is then rounded itself
        wanted = piece.origin - scale * zeros
        kind = torch.finfo(problem.grid.dtype)
        slack = kind.eps * wanted.abs() + kind.smallest_normal + 1e-6 * piece.w.abs().max()
        assert bool(((offset - wanted).abs() <= slack).all())


def errors(piece: Piece, scale: Tensor, offset: Tensor, p: float = 2.0, floor: Tensor | None = None) -> Tensor:
    """Σ h (e² + floor)^(p / 2) of every candidate, by the definition and in float64."""
    w, s, m = piece.w.double(), scale[:, None].double(), offset[:, None].double()
    codes = ((w - m) / s).round().clamp(0, piece.grid.top)
    squared = (w - s * codes - m).square()
    return (piece.h.double() * (squared + (0 if floor is None else floor)).pow(p / 2)).sum(1)


@few
@given(problems(), st.integers(0, 999))
def test_the_best_of_candidates_has_the_least_error_in_every_group_and_row(problem: Problem, seed: int) -> None:
    piece = whole(problem)
    scale, offset = piece.stored(*candidates(piece, seed))
    best = piece.best(*((scale[i : i + 1], offset[i : i + 1]) for i in range(CANDIDATES)))
    reached = errors(piece, best[0][None], best[1][None])[0].sqrt()
    least = errors(piece, scale, offset).amin(0).sqrt()
    assert bool((reached <= least * (1 + 1e-4) + 4e-7 * piece.w.abs().amax(0)).all())
    chosen = (scale == best[0]) & (offset == best[1])
    assert bool(chosen.any(0).all())


def test_the_first_of_equal_candidates_is_taken() -> None:
    piece = Piece(torch.zeros(2, 1, 1), torch.full((2, 1, 1), 0.5), replace(GRID, dtype=torch.float32))
    scale, offset = piece.best(*((torch.full((1, 1, 1), float(s)), torch.zeros(1, 1, 1)) for s in (3, 2, 1)))
    assert (scale.item(), offset.item()) == (3, 0)


@few
@given(problems(), st.integers(0, 999), st.sampled_from([0.5, 1.0, 1.5, 2.0]))
def test_a_norm_is_that_of_its_definition(problem: Problem, seed: int, p: float) -> None:
    piece = whole(problem)
    scale, offset = piece.stored(*candidates(piece, seed))
    size = float(piece.w.abs().max())
    assume(1e-3 < size < 1e3)
    floor = torch.full_like(piece.origin, (0.01 * size) ** 2)
    norms = piece.norms(scale, offset, Norm(p, floor))
    torch.testing.assert_close(norms.double(), errors(piece, scale, offset, p, floor.double()), rtol=2e-3, atol=0)


def test_a_solver_sees_a_grid_with_the_zero_that_a_scale_and_an_offset_have() -> None:
    piece = Piece(torch.tensor([1.0, 3.0])[:, None, None], torch.full((2, 1, 1), 0.5), GRID)
    assert piece.origin.item() == 2
    assert piece.zero(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 1.25)).item() == 1.5
    whole_zeros = replace(piece, grid=replace(GRID, zero="integer"))
    assert whole_zeros.zero(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), -0.8)).item() == 2
