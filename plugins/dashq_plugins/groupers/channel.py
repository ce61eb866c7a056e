"""A whole row shares one scale."""

from jaxtyping import Float
from torch import Tensor

from dashq import Curvature, Grouper, Grouping, hookimpl


class ChannelGrouper(Grouper):
    """One group per output channel: the least metadata, the coarsest fit."""

    name = "channel"

    def size_for(self, columns: int) -> int:
        return columns

    def group(self, weight: Float[Tensor, "rows columns"], curvature: Curvature) -> Grouping:
        return Grouping(columns=weight.shape[1], size=weight.shape[1])


@hookimpl
def dashq_groupers() -> list[type[Grouper]]:
    return [ChannelGrouper]
