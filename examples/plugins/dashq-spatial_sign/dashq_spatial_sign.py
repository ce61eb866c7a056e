"""The estimator `spatial_sign`: second moments in which long tokens count no more."""

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from dashq import Curvature, Estimator, Full, Layer, hookimpl

Moments = Float[Tensor, "columns columns"]


class SpatialSignEstimator(Estimator):
    """H = Σ x xᵀ / |x|^(2 `strength`): 0 is the ordinary second moment, 1 the spatial sign covariance.

    A few tokens of most language models have inputs many times as long as all others,
    and decide alone which columns matter. The spatial sign covariance (Visuri, Koivunen
    and Oja 2000) has the same eigenvectors for elliptical data, and no token can move it
    by more than its share.
    """

    name = "spatial_sign"  # what a recipe asks for
    produces = Full  # for solvers that need all of H, and those that need less
    strength: float = Field(default=1.0, ge=0, le=1)  # a parameter in the recipe

    def start(self, layer: Layer) -> Moments:
        return torch.zeros(layer.columns, layer.columns, dtype=torch.float64)

    def update(
        self, state: Moments, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]
    ) -> Moments:
        length = x.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)  # a token of zeros adds nothing
        signs: Tensor = x / length.pow(self.strength)[:, None]
        return state.to(x.device) + ((signs * token_weight[:, None]).T @ signs).double()

    def merge(self, state: Moments, other: Moments) -> Moments:
        return state + other

    def finish(self, state: Moments) -> Curvature:
        return Full(state.float())


@hookimpl
def dashq_estimators() -> list[type[Estimator]]:
    return [SpatialSignEstimator]
