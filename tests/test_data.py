"""Columns are cut into groups and joined again without loss."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq import Grouping
from tensors import groupings, noise


@given(grouping=groupings(), seed=st.integers(0, 2**16), leading=st.sampled_from([(), (3,), (2, 3)]))
def test_join_undoes_split(grouping: Grouping, seed: int, leading: tuple[int, ...]) -> None:
    x = noise(seed, *leading, grouping.columns)
    pieces = grouping.split(x)
    assert pieces.shape == (*leading, grouping.groups, grouping.size)
    assert torch.equal(grouping.join(pieces), x)


@given(grouping=groupings(), seed=st.integers(0, 2**16))
def test_filling_up_the_last_group_changes_neither_its_range_nor_its_importance(grouping: Grouping, seed: int) -> None:
    x, h = noise(seed, grouping.columns), noise(seed + 1, grouping.columns).square()
    ordered = range(grouping.columns) if grouping.order is None else grouping.order.tolist()
    last = list(ordered)[(grouping.groups - 1) * grouping.size :]
    assert grouping.split(x)[-1].aminmax() == x[last].aminmax()
    torch.testing.assert_close(grouping.split_importance(h)[-1].sum(), h[last].sum())
