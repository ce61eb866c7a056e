"""A token counts for the experts that the model chose, by how much the gate wants them."""

from jaxtyping import Bool, Float
from pydantic import PositiveFloat
from torch import Tensor

from dashq import Router, hookimpl


class GatedRouter(Router):
    """Weight p^power for chosen experts, 0 for the others, where p is the gate's probability.

    An expert's output is multiplied by its share, so that a squared error of it counts by the square of that share:
    `power: 2` weighs like the error, `power: 1` like the output.
    """

    name = "gated"
    power: PositiveFloat = 1.0

    def token_weights(
        self, probabilities: Float[Tensor, "tokens experts"], chosen: Bool[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        return probabilities**self.power * chosen


@hookimpl
def dashq_routers() -> list[type[Router]]:
    return [GatedRouter]
