"""A token counts for the experts that the model itself chose."""

from jaxtyping import Bool, Float
from torch import Tensor

from dashq import Router, hookimpl


class RoutedRouter(Router):
    """Weight 1 for chosen experts, 0 for the others: what each expert sees when the model runs."""

    name = "routed"

    def token_weights(
        self, probabilities: Float[Tensor, "tokens experts"], chosen: Bool[Tensor, "tokens experts"]
    ) -> Float[Tensor, "tokens experts"]:
        return chosen.to(probabilities.dtype)


@hookimpl
def dashq_routers() -> list[type[Router]]:
    return [RoutedRouter]
