"""Watch one block's linear layers while calibration batches pass through, and fold what they are given."""

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dashq.calibration.folds import Fold, FoldSums
from dashq.curvature import Curvature
from dashq.data import Layer
from dashq.errors import CheckpointError
from dashq.strategies import Estimator

ForwardPreHook = Callable[[nn.Module, tuple[Any, ...]], None]


@dataclass(frozen=True, eq=False)
class Observation:
    """One layer's curvature, and the number of tokens that it is from.

    `input_shift` is the mean of (x - x̂) x̂ᵀ, with x what the original model feeds the layer where it is given x̂.
    `row_weights` say how much each row's errors count, where they do not count alike: those of embeddings.
    Of an expert, `tokens` are those that the model sends to it, `effective_tokens` is what the tokens that its router
    plugin counts are worth, and `shrinkage` the share of the layer's pooled estimate in the curvature.
    """

    curvature: Curvature
    tokens: int
    effective_tokens: float | None = None
    shrinkage: float = 0.0
    input_shift: Float[Tensor, "columns columns"] | None = None
    row_weights: Float[Tensor, " rows"] | None = None


class SharedInputs:
    """The tensor that one layer of a block is given, or several such as q, k and v, folded once for all of them."""

    def __init__(self, layer: Layer, estimator: Estimator) -> None:
        self.layer, self.estimator = layer, estimator
        self.last: Tensor | None = None  # kept, so that no other tensor can take its place
        self.fold = Fold(layer, estimator)
        self._collected: FoldSums | None = None

    def see(
        self, inputs: Float[Tensor, "*batch columns"], original: Float[Tensor, "*batch columns"] | None = None
    ) -> None:
        """Every token counts once; `original` is what the original model gives this layer for the same tokens."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        self.fold.see(x, torch.ones(len(x), device=x.device), None if original is None else original.reshape(x.shape))
        self.last = inputs

    def collect(self, ranks: Collection[int], device: torch.device) -> None:
        """Let the processes of these `ranks` know what all have seen; the others observe nothing."""
        self._collected = self.fold.collected(ranks, device)

    def take(self, sums: FoldSums) -> None:
        """Observe what an earlier run has seen of these inputs."""
        self._collected = sums

    @property
    def sums(self) -> FoldSums:
        """The sums over all that all processes have seen, where they were collected."""
        return self._collected or self.fold.sums()

    @cached_property
    def observation(self) -> Observation:
        """The curvature of these inputs; `CheckpointError` names the layer where they are not finite."""
        sums = self.sums
        curvature = require_finite(self.layer.name, self.estimator.finish(sums.state))
        input_shift = None if sums.input_shift is None else sums.input_shift / sums.tokens
        return Observation(curvature, sums.tokens, input_shift=input_shift)


class Watcher:
    """Watches what one layer is given; layers that are given the same tensor share their `SharedInputs`.

    Sharing is decided on the first batch and checked on later ones, among the inputs of the block that `all_inputs`
    holds. Layers with different estimators share nothing.
    """

    def __init__(self, layer: Layer, estimator: Estimator, all_inputs: list[SharedInputs]) -> None:
        self._layer, self._estimator, self._all_inputs = layer, estimator, all_inputs
        self._inputs: SharedInputs | None = None
        self._original: Tensor | None = None

    def see(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook of the layer; a `CheckpointError` where it shares its inputs in some batches only."""
        if self._inputs is None:
            same = (other for other in self._all_inputs if other.last is inputs[0])
            alike = (other for other in same if other.estimator == self._estimator)
            self._inputs = next(alike, None) or self._own_inputs()
        if self._inputs.layer == self._layer:  # the first of those that share them folds them
            self._inputs.see(inputs[0], self._original)
        elif self._inputs.last is not inputs[0]:
            other_layer = self._inputs.layer.name
            raise CheckpointError(
                f"{self._layer.name} is given the inputs of {other_layer} in some batches only: not supported"
            )

    def see_original(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook of the original model's layer, which sees each batch before this one does."""
        self._original = inputs[0]

    @property
    def inputs(self) -> SharedInputs:
        """The inputs of the layer, which others may share; its own where it was never called."""
        self._inputs = self._inputs or self._own_inputs()
        return self._inputs

    @property
    def called(self) -> str:
        """The name of the layer that folds these inputs for all that share them; empty where there were none."""
        return self._inputs.layer.name if self._inputs else ""

    def share(self, inputs: SharedInputs) -> None:
        """Take part in inputs that another process has seen to be shared."""
        self._inputs = inputs

    def observation(self) -> Observation:
        """The layer's curvature; layers that share their inputs share it."""
        return self.inputs.observation

    def _own_inputs(self) -> SharedInputs:
        own_inputs = SharedInputs(self._layer, self._estimator)
        self._all_inputs.append(own_inputs)
        return own_inputs


def require_finite(name: str, curvature: Curvature) -> Curvature:
    """The curvature, if the inputs of the layer of that name were finite; else a `CheckpointError`."""
    if not curvature.diagonal().isfinite().all():
        raise CheckpointError(f"{name}: the inputs of this layer hold NaN or infinite values; try `dtype: float32`")
    return curvature


@contextmanager
def watching(modules: Mapping[str, nn.Module], hooks: Mapping[str, ForwardPreHook]) -> Generator[None]:
    """Attach each forward pre-hook to the module of the same name, and detach them all at the end."""
    handles = [modules[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
