"""Watch one block's linear layers while calibration batches pass through, and fold what they see."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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

    `input_shift` is the mean of (x - x̂) x̂ᵀ, with x what the original model feeds the layer where it is given x̂.
    Of an expert, `tokens` are those that the model sends to it, `effective_tokens` is what the tokens that its router
    plugin counts are worth, and `shrinkage` the share of the layer's pooled estimate in the curvature.
    """

    curvature: Curvature
    tokens: int
    effective_tokens: float | None = None
    shrinkage: float = 0.0
    input_shift: Float[Tensor, "columns columns"] | None = None


@runtime_checkable
class Witness(Protocol):
    """Sees what a layer is given."""

    def see(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook."""


class Fold:
    """The state of one estimator, for all layers of a block that are given the same tensor."""

    def __init__(self, layer: Layer, estimator: Estimator) -> None:
        self.layer, self.estimator = layer, estimator
        self.last: Tensor | None = None  # kept, so that no other tensor can take its place
        self._state, self._tokens = estimator.start(layer), 0
        self._input_shift: Tensor | None = None

    def see(
        self, inputs: Float[Tensor, "*batch columns"], original: Float[Tensor, "*batch columns"] | None = None
    ) -> None:
        """Every token counts once; `original` is what the original model gives this layer for the same tokens."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self._state = self.estimator.update(self._state, x, torch.ones(len(x), device=x.device))
        self._tokens, self.last = self._tokens + len(x), inputs
        if original is not None:
            input_shift = (original.reshape(x.shape).float() - x).T @ x
            self._input_shift = input_shift if self._input_shift is None else self._input_shift + input_shift

    @cached_property
    def observation(self) -> Observation:
        """What was learned; inputs that are not finite are an error that names the layer."""
        curvature = self.estimator.finish(self._state)
        input_shift = None if self._input_shift is None else self._input_shift / self._tokens
        return Observation(require_finite(self.layer.name, curvature), self._tokens, input_shift=input_shift)


class Watcher:
    """Folds the inputs of one layer, and once for all that are given the same tensor, such as q, k and v, into a fold.

    Which layers share one the first batch tells. `original` is what the original model gives the layer, batch by batch.
    """

    def __init__(self, layer: Layer, estimator: Estimator, folds: list[Fold]) -> None:
        self._layer, self._estimator, self._folds = layer, estimator, folds
        self._fold: Fold | None = None
        self.original: Tensor | None = None

    def see(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook."""
        if self._fold is None:
            alike = (fold for fold in self._folds if fold.last is inputs[0] and fold.estimator == self._estimator)
            self._fold = next(alike, None) or self._own()
        if self._fold.layer == self._layer:
            self._fold.see(inputs[0], self.original)
        elif self._fold.last is not inputs[0]:
            other = self._fold.layer.name
            raise CheckpointError(
                f"{self._layer.name} is given the inputs of {other} in some batches only: not supported"
            )

    def observation(self) -> Observation:
        """What was learned; layers that share their inputs share it."""
        return (self._fold or self._own()).observation

    def _own(self) -> Fold:
        fold = Fold(self._layer, self._estimator)
        self._folds.append(fold)
        return fold


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
