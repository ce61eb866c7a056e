"""Neighbouring columns share a scale."""

from typing import Literal

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from dashq import Curvature, Grouper, Grouping, PlanError, hookimpl


class ContiguousGrouper(Grouper):
    """Groups of `size` neighbouring columns.

    Where `size` does not divide the columns, `uneven` decides: `error` refuses, `divisor` takes the largest
    divisor below `size`, `pad` leaves the last group shorter.
    """

    name = "contiguous"
    size: PositiveInt = 64
    uneven: Literal["error", "divisor", "pad"] = "error"

    def size_for(self, columns: int) -> int:
        if columns % self.size == 0 or self.uneven == "pad":
            return min(self.size, columns)
        divisors = [size for size in range(1, columns + 1) if columns % size == 0]
        below = [size for size in divisors if size <= self.size]
        if self.uneven == "divisor":
            return below[-1]
        near = ", ".join(str(size) for size in [*below[-3:], *divisors[len(below) : len(below) + 2]])
        raise PlanError(
            f"group size {self.size} does not divide {columns} columns. Sizes near it that do: {near}; "
            "or say `uneven: divisor` or `uneven: pad` in the grouper"
        )

    def group(self, weight: Float[Tensor, "rows columns"], curvature: Curvature) -> Grouping:
        columns = weight.shape[1]
        return Grouping(columns=columns, size=self.size_for(columns))


@hookimpl
def dashq_groupers() -> list[type[Grouper]]:
    return [ContiguousGrouper]
