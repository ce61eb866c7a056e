"""Every token counts for every expert."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dashq import Router, hookimpl


class EveryExpertRouter(Router):
    """Weight 1 everywhere: no expert goes without tokens, at the price of tokens it would never see."""

    name = "every_expert"

    def token_weights(
        self, probabilities: Float[Tensor, "tokens experts"], chosen: Bool[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        return torch.ones_like(probabilities)


@hookimpl
def dashq_routers() -> list[type[Router]]:
    return [EveryExpertRouter]
