"""Watch one block's linear layers while calibration batches pass through, and fold what they see."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dashq.data import Curvature, Layer
from dashq.errors import CheckpointError
from dashq.strategies import Estimator


@dataclass(frozen=True, eq=False)
class Observation:
    """What calibration learned about one layer, and from how many tokens.

    Of an expert, `tokens` are those that the model sends to it, `effective_tokens` is what the tokens that its router
    plugin counts are worth, and `shrinkage` the share of the layer's pooled estimate in the curvature.
    """

    curvature: Curvature
    tokens: int
    effective_tokens: float | None = None
    shrinkage: float = 0.0


@runtime_checkable
class Witness(Protocol):
    """Sees what a layer is given."""

    def see(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook."""


class Watcher:
    """Folds the inputs of one layer into its estimator's state."""

    def __init__(self, layer: Layer, estimator: Estimator) -> None:
        self._layer, self._estimator = layer, estimator
        self._state, self._tokens = estimator.start(layer), 0

    def see(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook: every token counts once."""
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        self._state = self._estimator.update(self._state, x, torch.ones(len(x), device=x.device))
        self._tokens += len(x)

    def observation(self) -> Observation:
        """What was learned; inputs that are not finite are an error that names the layer."""
        curvature = self._estimator.finish(self._state)
        return Observation(require_finite(self._layer.name, curvature), self._tokens)


def require_finite(name: str, curvature: Curvature) -> Curvature:
    """The curvature of the layer of that name, if what the layer saw was finite."""
    if not curvature.diagonal().isfinite().all():
        raise CheckpointError(f"{name}: the inputs of this layer hold NaN or infinite values; try `dtype: float32`")
    return curvature


@contextmanager
def watching(modules: Mapping[str, nn.Module], watchers: Mapping[str, Witness]) -> Generator[None]:
    """Attach each watcher to the module of the same name, and detach them all at the end."""
    handles = [modules[name].register_forward_pre_hook(watcher.see) for name, watcher in watchers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
