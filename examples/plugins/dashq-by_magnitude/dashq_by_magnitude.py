"""The grouper `by_magnitude`: columns whose weights are of a like size share a scale."""

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor

from dashq import Curvature, Grouper, Grouping, PlanError, hookimpl


class ByMagnitudeGrouper(Grouper):
    """Groups of `size` columns in the order of the root mean square of their weights.

    A group's scale has to reach its largest weight: one column of large weights among
    small ones costs all of them resolution. The order is stored with the layer, 32 bits
    for each column, and only formats that hold it take it.
    """

    name = "by_magnitude"  # what a recipe asks for
    reorders = True  # plans then count the order among a layer's bytes
    size: PositiveInt = 64  # a parameter in the recipe

    def size_for(self, columns: int) -> int:
        if columns % self.size:
            raise PlanError(f"by_magnitude needs a divisor of the columns: {self.size} does not divide {columns}")
        return self.size

    def group(self, weight: Float[Tensor, "rows columns"], curvature: Curvature) -> Grouping:
        order = weight.square().mean(0).argsort(stable=True)  # the same bytes in every run
        return Grouping(columns=weight.shape[1], size=self.size, order=order)


@hookimpl
def dashq_groupers() -> list[type[Grouper]]:
    return [ByMagnitudeGrouper]
