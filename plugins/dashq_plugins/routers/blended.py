"""A token counts for the experts that the model chose, and a little for all others."""

from typing import Annotated

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from dashq import Router, hookimpl


class BlendedRouter(Router):
    """Weight 1 for chosen experts, `fraction` for the others: the usual remedy for experts with few tokens."""

    name = "blended"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.05

    def token_weights(
        self, probabilities: Float[Tensor, "tokens experts"], chosen: Bool[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        return chosen.to(probabilities.dtype).clamp_min(self.fraction)


@hookimpl
def dashq_routers() -> list[type[Router]]:
    return [BlendedRouter]
