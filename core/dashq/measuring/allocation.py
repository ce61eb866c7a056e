"""Spend a budget of bytes on one option for each part of a model, so that the sum of their costs is least."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dashq.errors import PlanError

BISECTIONS = 100  # halvings of the price's range: far below the resolution of float64
PRICES = 160  # that the curve of costs against bytes is followed at, each √2 times below the one before
ROUNDING = 1e-9  # of the costs, by which a sum may differ from the same sum taken in another order


@dataclass(frozen=True)
class Option:
    """One way to store a part: the bytes that it takes on disk, and its cost to the model."""

    bytes: int
    cost: float


@dataclass(frozen=True, eq=False)
class _Table:
    """All options, a row for each part; rows with fewer options than others are filled up with infinite costs."""

    bytes: Float[Tensor, "parts options"]  # float64, which holds them exactly
    costs: Float[Tensor, "parts options"]

    def at_price(self, price: float) -> tuple[float, float]:
        """Bytes and cost of the choice that is best where a byte has this price and nothing else limits it."""
        chosen = (self.costs + price * self.bytes).argmin(1, keepdim=True)
        return float(self.bytes.gather(1, chosen).sum()), float(self.costs.gather(1, chosen).sum())


# The states that are kept after a part, as many as there are: the index of the state before each, and of its option.
_Step = tuple[Int[Tensor, "_"], Int[Tensor, "_"]]


def allocate(parts: Sequence[Sequence[Option]], budget: int) -> tuple[int, ...]:
    """The index of each part's option such that at most `budget` bytes are spent and the costs' sum is least.

    Exact: partial choices are extended part by part. Kept are those that no other beats in bytes and in cost, and that
    a Lagrangian bound does not exclude from the optimum. Raises `PlanError` where the smallest options take more.
    """
    least = sum(min(option.bytes for option in options) for options in parts)
    if least > budget:
        raise PlanError(f"the smallest choices take {least:,} bytes, {least - budget:,} more than {budget:,}")
    table = _table(parts)
    price, enough = _price(table, budget)
    slack = ROUNDING * float(table.costs[table.costs.isfinite()].abs().sum())
    rest = _sums_from_each((table.costs + price * table.bytes).min(1).values)
    smallest = _sums_from_each(table.bytes.min(1).values)
    spent, cost = torch.zeros(2, 1, dtype=torch.float64)
    steps: list[_Step] = []
    for part in range(len(parts)):
        options = len(parts[part])
        # Every state is extended by every option of the part: [states · options].
        next_spent = (spent[:, None] + table.bytes[part, :options]).flatten()
        next_cost = (cost[:, None] + table.costs[part, :options]).flatten()
        # What is left of the parts costs at least `rest`, where bytes beyond the budget are paid for at the price.
        bound = next_cost + price * (next_spent - budget) + rest[part + 1]
        allowed = (next_spent + smallest[part + 1] <= budget) & (bound <= enough + slack)
        kept = _frontier(next_spent, next_cost, allowed)
        spent, cost = next_spent[kept], next_cost[kept]
        steps.append((kept // options, kept % options))
    return _trace(steps, int(cost.argmin()))


def trade_off(parts: Sequence[Sequence[Option]]) -> list[Option]:
    """All bytes and all costs of the best choices at falling prices of a byte, by rising bytes: a convex curve."""
    table = _table(parts)
    highest = 1.0 + 2 * float(torch.where(table.costs.isfinite(), table.costs, 0.0).abs().max())
    sums = [table.at_price(price) for price in (*(highest * 2 ** (-step / 2) for step in range(PRICES)), 0.0)]
    return [Option(int(spent), cost) for spent, cost in dict.fromkeys(sums)]


def _table(parts: Sequence[Sequence[Option]]) -> _Table:
    width = max(len(options) for options in parts)
    filling = [[Option(options[0].bytes, float("inf"))] * (width - len(options)) for options in parts]
    rows = [[*options, *more] for options, more in zip(parts, filling, strict=True)]
    return _Table(
        torch.tensor([[option.bytes for option in row] for row in rows], dtype=torch.float64),
        torch.tensor([[option.cost for option in row] for row in rows], dtype=torch.float64),
    )


def _price(table: _Table, budget: int) -> tuple[float, float]:
    """The price of a byte that bounds the optimum best, and the cost of a choice within the budget."""
    finite = torch.where(table.costs.isfinite(), table.costs, 0.0)
    low, high = 0.0, 1.0 + 2 * float(finite.abs().max())  # a byte that costs more than any choice could save
    if table.at_price(low)[0] <= budget:
        high = low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if table.at_price(middle)[0] <= budget:
            high = middle
        else:
            low = middle
    return high, table.at_price(high)[1]


def _sums_from_each(values: Float[Tensor, " parts"]) -> list[float]:
    """The sum of each part's value and all that follow it; 0 behind the last."""
    return [*values.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def _frontier(
    spent: Float[Tensor, " states"], cost: Float[Tensor, " states"], allowed: Bool[Tensor, " states"]
) -> Int[Tensor, " kept"]:
    """The indices of the allowed states that are cheaper than all that spend no more, by rising bytes."""
    index = allowed.nonzero().flatten()
    index = index[cost[index].argsort(stable=True)]
    index = index[spent[index].argsort(stable=True)]
    ordered = cost[index]
    before = torch.cat([torch.tensor([float("inf")], dtype=ordered.dtype), ordered.cummin(0).values[:-1]])
    return index[ordered < before]


def _trace(steps: Sequence[_Step], state: int) -> tuple[int, ...]:
    """The option of every part, followed back from the best last state."""
    chosen = []
    for parents, options in reversed(steps):
        chosen.append(int(options[state]))
        state = int(parents[state])
    return tuple(reversed(chosen))
