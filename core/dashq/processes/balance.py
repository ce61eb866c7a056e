"""The balance of work among processes: pieces of known cost, neighbours together."""

from collections.abc import Sequence


def balanced(costs: Sequence[float], processes: int) -> list[int]:
    """The process for each piece of work, of which each has some in a row: that in whose share its middle falls.

    No load is above the mean by more than the largest piece.
    """
    total, before = sum(costs), 0.0
    chosen = []
    for cost in costs:
        middle = (before + cost / 2) / total if total else 0.0
        chosen.append(min(int(middle * processes), processes - 1))
        before += cost
    return chosen
