"""The rank correlation of expected and measured losses, against its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq.measuring.divergence import rank_correlation


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=9, unique=True))
def test_rank_correlation_sees_only_the_order(values: list[int]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    assert rank_correlation(x.tolist(), x.exp().tolist()) == pytest.approx(1)
    assert rank_correlation(x.tolist(), (-(x**3)).tolist()) == pytest.approx(-1)


def test_equal_values_share_their_ranks() -> None:
    # Ranks 1.5, 1.5, 3 and 1, 2, 3: their deviations are -½, -½, 1 and -1, 0, 1.
    assert rank_correlation([5.0, 5.0, 7.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


@pytest.mark.parametrize(("x", "y"), [([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0], [1.0])])
def test_there_is_none_where_nothing_differs(x: list[float], y: list[float]) -> None:
    assert rank_correlation(x, y) is None
