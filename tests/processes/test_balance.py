"""Work of known cost is spread so that no process has much more than another."""

from collections.abc import Sequence
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from dashq.processes.balance import balanced


def longest(costs: Sequence[float], chosen: Sequence[int], processes: int) -> float:
    return max(
        sum(cost for cost, own in zip(costs, chosen, strict=True) if own == process) for process in range(processes)
    )


def test_the_largest_goes_first() -> None:
    assert balanced([1, 8, 2, 4, 2, 7], 2) == [1, 0, 0, 1, 0, 1]
    assert balanced([3, 3], 1) == [0, 0]
    assert balanced([], 4) == []


@given(costs=st.lists(st.integers(0, 20), min_size=1, max_size=6), processes=st.integers(1, 3))
def test_no_process_has_more_than_four_thirds_of_the_least_possible(costs: list[int], processes: int) -> None:
    best = min(longest(costs, chosen, processes) for chosen in product(range(processes), repeat=len(costs)))
    assert longest(costs, balanced(costs, processes), processes) <= (4 / 3) * best + 1e-9
