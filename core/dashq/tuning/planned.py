"""The numbers that a tuner will change and the memory of its passes, from shapes alone before a weight is read."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dashq.data import StoredLayer, Tunable
from dashq.device import free_memory
from dashq.errors import PluginError
from dashq.model.decoder import Model
from dashq.strategies import Tuner

# Memory that kept passes may take, as a share of what is free.
SHARE_OF_FREE_MEMORY = 1 / 8


def kept_bytes(model: Model, layers: Iterable[StoredLayer], tuner: Tuner) -> int:
    """Memory in bytes of a sample's passes through all blocks, kept until the way back: weights, codes, activations.

    A token's activations are about what its layers are given and give, once each: fitted to blocks of Llama's shape.
    """
    own = [layer.layer for layer in layers if layer.layer.role == "linear"]
    inside = tuner.sequence_length * sum(layer.rows + layer.columns for layer in own)
    numbers = sum(layer.weights for layer in own) + inside
    return model.dtype.itemsize * numbers + sum(layer.weights for layer in own)


def keeps_all(model: Model, layers: Iterable[StoredLayer], tuner: Tuner, processes: int = 1) -> bool:
    """True where a sample's passes, in each of the processes, fit into the memory that may be taken of what is free."""
    return processes * kept_bytes(model, layers, tuner) <= SHARE_OF_FREE_MEMORY * free_memory(model.device)


def planned_tunables(model: Model, layers: Iterable[StoredLayer]) -> list[Tunable]:
    """The tunables of the model with these layers quantized, on the meta device."""
    own = [tunable for layer in layers if layer.layer.role == "linear" for tunable in _of_layer(layer)]
    gains = {name: model.network.get_parameter(name) for name in norm_gains(model)}
    return [*own, *(Tunable("norm", name, _planned(len(gain))) for name, gain in gains.items())]


def norm_gains(model: Model) -> list[str]:
    """The names of all gains of norms: vectors called `weight` of modules whose class is called a norm."""
    return [
        f"{name}.weight"
        for name, module in model.network.named_modules()
        if "norm" in type(module).__name__.lower()
        if isinstance(gain := getattr(module, "weight", None), Tensor) and gain.dim() == 1
    ]


def optimizer_for(tuner: Tuner, tunables: Sequence[Tunable]) -> tuple[torch.optim.Optimizer, list[Tunable]]:
    """The tuner's optimizer, and the tunables that it changes; a `PluginError` where these are none, or not all."""
    kinds = ", ".join(dict.fromkeys(f"{tunable.kind}s" for tunable in tunables)) or "none"
    try:
        optimizer = tuner.optimizer(tunables)
    except ValueError as error:  # torch refuses to optimize nothing
        raise PluginError(f"tuner {tuner.name!r} changes none of what can be tuned here, {kinds}: {error}") from error
    chosen = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    changed = [tunable for tunable in tunables if id(tunable.parameter) in chosen]
    if not changed:
        raise PluginError(f"tuner {tuner.name!r} changes none of what can be tuned here, {kinds}")
    if len(changed) < len(chosen):
        raise PluginError(f"tuner {tuner.name!r}: its optimizer has to change parameters of the tunables alone")
    return optimizer, changed


def _of_layer(layer: StoredLayer) -> list[Tunable]:
    """Those of one layer, as `dashq.tuning.values` has them."""
    name, grid, blocks = layer.layer.name, layer.grid, layer.grid.super_blocks
    scale = layer.empty().scale
    shape = (scale.numel() // blocks.groups, 1) if blocks else tuple(scale.shape)
    tunables = [Tunable("scale", name, _planned(*shape))]
    if grid.zero == "real":
        tunables.append(Tunable("offset", name, _planned(*shape)))
    return tunables


def _planned(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))
