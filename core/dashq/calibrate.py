"""Watch one block's linear layers while calibration batches pass through, and fold what they see."""

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

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


class Fold:
    """The state of one estimator, which all layers share that are given the same tensor."""

    def __init__(self, layer: Layer, estimator: Estimator) -> None:
        self.layer, self.estimator = layer, estimator
        self.tokens = 0
        self.last: Tensor | None = None  # kept, so that no other tensor can take its place
        self._state = estimator.start(layer)

    def see(self, inputs: Float[Tensor, "*batch columns"]) -> None:
        """Every token counts once."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self._state = self.estimator.update(self._state, x, torch.ones(len(x), device=x.device))
        self.tokens, self.last = self.tokens + len(x), inputs

    def observation(self) -> Observation:
        """What was learned; inputs that are not finite are an error that names the layer."""
        curvature = self.estimator.finish(self._state)
        return Observation(require_finite(self.layer.name, curvature), self.tokens)


class Watcher:
    """Folds what some layers of one block are given, once for those that are given the same tensor.

    Which ones those are the first batch tells: q, k and v, or gate and up, in most decoders.
    """

    def __init__(self, estimators: Mapping[str, tuple[Layer, Estimator]]) -> None:
        self._estimators = estimators
        self._folds: dict[str, Fold] = {}

    @property
    def names(self) -> Collection[str]:
        """The layers to watch."""
        return self._estimators.keys()

    def see(self, name: str, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook of the layer of that name."""
        x = inputs[0]
        if name not in self._folds:
            layer, estimator = self._estimators[name]
            alike = (fold for fold in self._folds.values() if fold.last is x and fold.estimator == estimator)
            self._folds[name] = next(alike, None) or Fold(layer, estimator)
        fold = self._folds[name]
        if fold.layer.name == name:
            fold.see(x)
        elif fold.last is not x:
            raise CheckpointError(f"{name} is given the inputs of {fold.layer.name} in some batches only: not supported")

    def observations(self) -> dict[str, Observation]:
        """What was learned about each layer; those that share their inputs share it."""
        folds = {name: self._folds.get(name) or Fold(*given) for name, given in self._estimators.items()}
        learned = {fold: fold.observation() for fold in folds.values()}
        return {name: learned[fold] for name, fold in folds.items()}


def require_finite(name: str, curvature: Curvature) -> Curvature:
    """The curvature of the layer of that name, if what the layer saw was finite."""
    if not curvature.diagonal().isfinite().all():
        raise CheckpointError(f"{name}: the inputs of this layer hold NaN or infinite values; try `dtype: float32`")
    return curvature


@contextmanager
def watching(modules: Mapping[str, nn.Module], watcher: Watcher) -> Generator[None]:
    """Show the watcher what its layers are given, for the duration of the `with` statement."""
    handles = [modules[name].register_forward_pre_hook(partial(watcher.see, name)) for name in watcher.names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
