"""Work of known cost is spread so that no process has much more than another, and neighbours stay together."""

from hypothesis import given
from hypothesis import strategies as st

from dashq.processes.balance import balanced


def test_each_process_has_some_pieces_in_a_row() -> None:
    assert balanced([8, 1, 1, 1, 1], 2) == [0, 1, 1, 1, 1]
    assert balanced([1] * 8, 3) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert balanced([3, 3], 1) == [0, 0]
    assert balanced([0, 0], 2) == [0, 0]
    assert balanced([], 4) == []


@given(costs=st.lists(st.integers(0, 20), min_size=1, max_size=40), processes=st.integers(1, 9))
def test_no_load_is_above_the_mean_by_more_than_the_largest_piece(costs: list[int], processes: int) -> None:
    chosen = balanced(costs, processes)
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(processes))
    for process in range(processes):
        load = sum(cost for cost, own in zip(costs, chosen, strict=True) if own == process)
        assert load <= sum(costs) / processes + max(costs) + 1e-9
