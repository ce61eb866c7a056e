"""Neighbouring columns share a scale, and sizes that do not fit are refused with those that do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq import Diagonal, Grouping, PlanError
from dashq_plugins.groupers.contiguous import ContiguousGrouper

SIZES = st.integers(1, 600)


def group(grouper: ContiguousGrouper, columns: int) -> Grouping:
    return grouper.group(torch.zeros(2, columns), Diagonal(torch.ones(columns)))


def test_neighbours_share_a_scale() -> None:
    grouping = group(ContiguousGrouper(size=4), 12)
    assert grouping.split(torch.arange(12)).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_size_that_does_not_divide_is_refused_with_sizes_near_it_that_do() -> None:
    with pytest.raises(PlanError, match=r"size 128 does not divide 576 columns.* near .* do: 64, 72, 96, 144, 192;"):
        ContiguousGrouper(size=128).size_for(576)


def test_a_size_above_the_columns_is_refused_with_the_largest_that_divide() -> None:
    with pytest.raises(PlanError, match=r"size 128 does not divide 48 columns.* do: 16, 24, 48;"):
        ContiguousGrouper(size=128).size_for(48)


@given(SIZES, SIZES)
def test_divisor_takes_the_largest_size_that_divides(size: int, columns: int) -> None:
    chosen = ContiguousGrouper(size=size, uneven="divisor").size_for(columns)
    assert columns % chosen == 0
    assert not any(columns % larger == 0 for larger in range(chosen + 1, min(size, columns) + 1))


def test_divisor_of_576_below_128_is_96() -> None:
    assert ContiguousGrouper(size=128, uneven="divisor").size_for(576) == 96


def test_pad_leaves_the_last_group_shorter() -> None:
    grouping = group(ContiguousGrouper(size=4, uneven="pad"), 6)
    assert grouping.split(torch.arange(6)).tolist() == [[0, 1, 2, 3], [4, 5, 5, 5]]  # filled up with the last column
    assert grouping.split_importance(torch.ones(6)).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@given(SIZES, SIZES)
def test_pad_keeps_the_size_unless_there_are_fewer_columns(size: int, columns: int) -> None:
    assert ContiguousGrouper(size=size, uneven="pad").size_for(columns) == min(size, columns)
