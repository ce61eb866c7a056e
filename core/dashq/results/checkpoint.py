"""Read a finished result back: which layers are quantized, and their codes, scales and offsets."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dashq.data import Quantized, StoredLayer
from dashq.errors import CheckpointError, PlanError
from dashq.model.decoder import block_matrices
from dashq.model.progress_bars import without_progress_bars
from dashq.model.source import Shards
from dashq.programs import Contents
from dashq.registry import Registry, installed_registry
from dashq.results.output import RECIPE, REPORT, packed, quantization_config
from dashq.results.report import LayerReport
from dashq.runtime.quantizer import FORMAT_VERSION, QUANT_METHOD, DashqConfig
from dashq.strategies import Serializer


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A quantized model on disk, in one `file` of its format or in shards.

    `recipe` and `report` are empty where another program than dashq wrote it.
    """

    folder: Path
    serializer: Serializer
    file: str | None
    layers: Mapping[str, StoredLayer]
    tensors: Mapping[str, Any]
    recipe: Mapping[str, Any]
    report: Mapping[str, Any]

    def packed(self, name: str) -> dict[str, Tensor]:
        """A quantized layer's tensors by the last part of their names, with shapes and types as they have to be."""
        layer = self.layers[name]
        planned = self.serializer.pack(layer.empty())
        found = {}
        for key, expected in planned.items():
            if f"{name}.{key}" not in self.tensors:
                raise CheckpointError(f"{self.folder} lacks the tensor {name}.{key}")
            tensor = self.tensors[f"{name}.{key}"][...]
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise CheckpointError(
                    f"{self.folder}: the tensor {name}.{key} is {tensor.dtype} {list(tensor.shape)} where format "
                    f"{self.serializer.name!r} needs {expected.dtype} {list(expected.shape)}"
                )
            found[key] = tensor
        return found

    def quantized(self, name: str) -> Quantized:
        """Codes, scales and offsets of a layer."""
        layer = self.layers[name]
        try:
            result = self.serializer.unpack(self.packed(name), layer.layer.columns, layer.size, layer.grid)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {name}: {error}") from error
        if not (result.scale.isfinite().all() and result.offset.isfinite().all()):
            raise CheckpointError(f"{self.folder}: {name}: a scale or offset is not a finite number")
        return result

    def others(self) -> Iterator[str]:
        """The names of all tensors that belong to no quantized layer, or are biases."""
        mine = {f"{name}.{key}" for name, layer in self.layers.items() for key in self.serializer.pack(layer.empty())}
        return (name for name in self.tensors if name not in mine)

    def config(self) -> PretrainedConfig:
        """The model's configuration as if it was not quantized."""
        config: PretrainedConfig = AutoConfig.from_pretrained(self.folder)
        vars(config).pop("quantization_config", None)
        return config


def open_checkpoint(folder: Path, registry: Registry | None = None) -> Checkpoint:
    """A result of dashq, or another program's checkpoint that a serializer recognises.

    `registry` has the serializers that can be; without one they are those of the installed plugins. Raises
    `CheckpointError` for a folder that is neither, or not whole.
    """
    registry = registry or installed_registry()
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: {folder.absolute()}")
    if not (folder / REPORT).exists():
        for cls in registry.serializers.values():
            if found := cls.recognise(folder):
                return _with_tensors(folder, cls(), None, {layer.layer.name: layer for layer in found}, {}, {})
        raise CheckpointError(f"{folder} is no finished result of dashq: it has no {REPORT}")
    try:
        recipe, report = yaml.safe_load((folder / RECIPE).read_text()), json.loads((folder / REPORT).read_text())
        fields = dict(recipe["serializer"])
        reports = TypeAdapter(list[LayerReport]).validate_python(report["layers"])
        serializer = build_serializer(fields, registry)
        layers = {one.name: packed(one, serializer) for one in reports}
        config = json.loads((folder / "config.json").read_text())
        file = serializer.file(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, ValidationError, PlanError) as error:
        raise CheckpointError(
            f"{folder}: {RECIPE}, {REPORT} or config.json is not as dashq writes it: {error}"
        ) from error
    settings = config.get("quantization_config", {})
    if settings.get("quant_method") == QUANT_METHOD:
        DashqConfig(**settings)  # refuses other versions
    return _with_tensors(folder, serializer, file, layers, recipe, report)


def build_serializer(fields: Mapping[str, Any], registry: Registry | None = None) -> Serializer:
    """The serializer of that `name`, with its parameters; without a registry from the installed plugins."""
    return DashqConfig(dict(fields), {}, FORMAT_VERSION).build_serializer(registry or installed_registry())


@without_progress_bars()
def open_network(folder: Path, dtype: torch.dtype, registry: Registry | None = None) -> PreTrainedModel:
    """The model in transformers with dashq's own layers, whatever format its weights are in."""
    checkpoint = open_checkpoint(folder, registry)
    config = checkpoint.config()
    if checkpoint.file:
        return _network_from_file(checkpoint, config, dtype)
    settings = quantization_config(checkpoint.serializer, checkpoint.layers.values())
    config.quantization_config = settings | {"serializer": checkpoint.serializer}
    opened: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype)
    opened.eval()
    return opened


def _network_from_file(checkpoint: Checkpoint, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    network.eval().requires_grad_(False)
    state = {name: checkpoint.tensors[name][...] for name in checkpoint.others()}
    matrices = block_matrices(network)
    quantized = {matrices[name].parameter for name in checkpoint.layers}
    missing = sorted(network.state_dict().keys() - state.keys() - quantized - network.all_tied_weights_keys.keys())
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {len(missing)} tensors, the first is {missing[0]}")
    network.load_state_dict(state, strict=False)
    for name in checkpoint.layers:
        weight = network.get_parameter(matrices[name].parameter)
        matrices[name].of(weight).copy_(checkpoint.quantized(name).dequantize())
    return network


def _with_tensors(
    folder: Path,
    serializer: Serializer,
    file: str | None,
    layers: Mapping[str, StoredLayer],
    recipe: Mapping[str, Any],
    report: Mapping[str, Any],
) -> Checkpoint:
    if file:
        tensors = serializer.read(folder / file, Contents(folder=folder, layers=layers))
    else:
        shards = Shards(folder)
        tensors = shards.lazy(list(shards.headers()))
    return Checkpoint(
        folder=folder, serializer=serializer, file=file, layers=layers, tensors=tensors, recipe=recipe, report=report
    )
