"""Examples are what their descriptions say, from ordinary to degenerate, and none lies outside of what is allowed."""

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from dashq import Coupled, Curvature, Diagonal, Full, Grid, Grouping, Quantized
from dashq.solving.stored_values import store
from dashq.solving.super_blocks import factor
from dashq.testing import LowRank, check_curvature, curvatures
from dashq.testing.comparison import equal
from dashq.testing.examples import (
    IMPORTANCE_KINDS,
    WEIGHT_KINDS,
    GateOutput,
    Problem,
    TokenBatch,
    block_grids,
    block_problems,
    gates,
    grids,
    groupings,
    importances,
    problems,
    quantized_layers,
    tokens,
    weights,
)

few = settings(max_examples=40)
every_grid = grids() | block_grids()


@few
@given(weights(3, 8), importances(8))
def test_weights_and_importances_are_finite_and_no_importance_is_negative(w: torch.Tensor, h: torch.Tensor) -> None:
    assert (w.shape, w.dtype, h.shape, h.dtype) == ((3, 8), torch.float32, (8,), torch.float32)
    assert bool(w.isfinite().all())
    assert bool((h.isfinite() & (h >= 0)).all())


def test_the_degenerate_is_among_them() -> None:
    assert not find(importances(8), lambda h: not h.any()).any()
    constant = find(weights(2, 8), lambda w: bool((w == w[:, :1]).all()))
    assert bool((constant == constant[:, :1]).all())
    assert find(groupings(7), lambda grouping: grouping.columns % grouping.size > 0).groups > 1
    assert find(groupings(7), lambda grouping: grouping.order is not None).order is not None
    assert len(find(tokens(), lambda batch: not len(batch.inputs)).inputs) == 0
    assert {"constant", "tiny"} < set(WEIGHT_KINDS)
    assert "wholly zero" in IMPORTANCE_KINDS


@few
@given(st.integers(1, 30).flatmap(groupings))
def test_groups_hold_every_column_once(grouping: Grouping) -> None:
    columns = torch.arange(grouping.columns)
    assert 1 <= grouping.size <= grouping.columns
    assert grouping.join(grouping.split(columns)).equal(columns)


@few
@given(grids(("symmetric",)), grids(("real",)))
def test_grids_have_the_zeros_that_are_asked_for_and_negative_scales_where_there_can_be(one: Grid, other: Grid) -> None:
    assert one.zero == "symmetric"
    assert (other.zero, other.negative_scales) == ("real", False)
    assert {1 <= grid.bits <= 8 for grid in (one, other)} == {True}


def test_grids_are_of_every_kind() -> None:
    for zero in ("real", "integer", "symmetric"):
        assert find(grids(), lambda grid, zero=zero: grid.zero == zero).zero == zero  # type: ignore[misc]
    assert find(grids(), lambda grid: grid.negative_scales).zero == "symmetric"


@few
@given(problems(needs=Full) | block_problems(needs=Full))
def test_a_problem_fits_together_and_has_the_curvature_that_is_needed(problem: Problem) -> None:
    columns = problem.weight.shape[1]
    assert problem.grouping.columns == columns == len(problem.curvature.diagonal())
    assert isinstance(problem.curvature, Full)
    if problem.grid.super_blocks:
        assert problem.grouping.size == problem.grid.super_blocks.size
        assert columns % problem.grid.super_blocks.columns == 0


@few
@given(st.sampled_from([1, 4]).flatmap(lambda chunk: st.tuples(st.just(chunk), tokens(chunk))))
def test_tokens_are_cut_where_an_estimator_allows_it_and_count_whole_times(example: tuple[int, TokenBatch]) -> None:
    chunk, batch = example
    assert len(batch.inputs) % chunk == batch.cut % chunk == 0
    assert 0 <= batch.cut <= len(batch.inputs) == len(batch.counts)
    assert set(batch.counts.tolist()) <= {0, 1, 2, 3}


@few
@given(gates())
def test_a_gate_gives_shares_and_chooses_the_largest_for_every_token(gate: GateOutput) -> None:
    torch.testing.assert_close(gate.probabilities.sum(1), torch.ones(len(gate.probabilities)))
    assert gate.chosen.sum(1).unique().numel() == 1
    assert bool(gate.chosen.any(1).all())
    least = torch.where(gate.chosen, gate.probabilities, torch.inf).amin(1)
    most = torch.where(gate.chosen, -torch.inf, gate.probabilities).amax(1)
    assert bool((least >= most).all())


@few
@given(every_grid.flatmap(quantized_layers))
def test_a_quantized_layer_lies_in_its_grid(q: Quantized) -> None:
    grid, blocks = q.grid, q.grid.super_blocks
    assert int(q.codes.max()) <= grid.top
    assert (q.scale.dtype, q.offset.dtype) == (grid.dtype, grid.offset_dtype)
    if blocks:
        for values in (q.scale,) if blocks.signed else (q.scale, -q.offset):
            factor(values.unflatten(1, (-1, blocks.groups)).flatten(0, 1), blocks, blocks.signed)  # raises if it cannot
    else:
        scale, offset = store(q.scale.float(), q.offset.float(), grid)
        assert scale.equal(q.scale.float())
        torch.testing.assert_close(offset, q.offset.float())


def test_a_search_for_an_example_ends_with_the_same_one() -> None:
    one, other = (find(problems(columns=4), lambda problem: len(problem.weight) == 3) for _ in range(2))
    assert equal(one, other)


@settings(max_examples=40)
@given(curvatures(6), curvatures(6))
def test_every_example_keeps_the_contract_whatever_it_is_blended_with(one: Curvature, other: Curvature) -> None:
    check_curvature(one, other)


def test_a_low_rank_curvature_is_a_diagonal_and_some_directions() -> None:
    curvature = LowRank(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 3.0]]))
    assert curvature.dense().tolist() == [[2, 3], [3, 11]]
    assert curvature.diagonal().tolist() == [2, 11]


@given(curvatures(4, Coupled))
def test_curvatures_are_of_the_kind_that_is_needed(curvature: Curvature) -> None:
    assert isinstance(curvature, Coupled)


def test_a_kind_of_which_there_are_no_examples_is_told() -> None:
    class Banded(Diagonal):
        pass

    with pytest.raises(ValueError, match="not of Banded"):
        curvatures(4, Banded)
