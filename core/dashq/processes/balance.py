"""The balance of work among processes: pieces of known cost, the largest first."""

from collections.abc import Sequence


def balanced(costs: Sequence[float], processes: int) -> list[int]:
    """The process for each piece of work: the largest goes first, each to the process with the least so far.

    Its greatest load is at most a third above the least that is possible (Graham 1969).
    """
    loads = [0.0] * processes
    chosen = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        process = min(range(processes), key=loads.__getitem__)
        chosen[index] = process
        loads[process] += costs[index]
    return chosen
