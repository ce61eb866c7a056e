"""Read a finished result back: its quantized layers with their codes, scales and offsets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dashq.data import Contents, Quantized, StoredLayer
from dashq.device import type_name
from dashq.errors import CheckpointError, PlanError, cause, refusing
from dashq.model.decoder import block_matrices
from dashq.model.files import CONFIG
from dashq.model.loading import check_size, network_of, read_config, read_network
from dashq.model.location import Location
from dashq.model.mappings import read_mapping
from dashq.model.mixtures import Matrix
from dashq.model.progress_bars import without_progress_bars
from dashq.model.source import Shards
from dashq.model.transformers_internals import tied_weights
from dashq.registry import Registry, installed_registry
from dashq.results.folder import RECIPE
from dashq.results.report import REPORT, Report, read_report
from dashq.results.settings import quantization_config, stored_layer
from dashq.runtime.kernel_choice import AUTO
from dashq.runtime.quantizer import QUANT_METHOD, WEIGHTS_ENTRY, DashqConfig, build_serializer
from dashq.strategies import Container, Serializer


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A quantized model on disk, in the one file of a `container` or in shards.

    Where another program than dashq wrote it, `recipe` is empty and `report` None.
    """

    location: Location
    serializer: Serializer
    container: Container | None
    layers: Mapping[str, StoredLayer]
    tensors: Mapping[str, Any]
    recipe: Mapping[str, Any]
    report: Report | None

    @property
    def folder(self) -> Path:
        """The folder with all its files."""
        return self.location.folder

    @property
    def file(self) -> Path | None:
        """The one file that its tensors are in; None for shards."""
        return self.folder / self.container.file if self.container else None

    def packed(self, name: str) -> dict[str, Tensor]:
        """A quantized layer's tensors by the last part of their names, checked for shapes and types.

        Raises `CheckpointError` where one is missing or of another shape or type.
        """
        layer = self.layers[name]
        planned = self.serializer.pack(layer.empty())
        tensors = {}
        for key, expected in planned.items():
            if f"{name}.{key}" not in self.tensors:
                raise CheckpointError(f"{self.folder} lacks the tensor {name}.{key}")
            tensor = self.tensors[f"{name}.{key}"][...]
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise CheckpointError(
                    f"{self.folder}: the tensor {name}.{key} is {type_name(tensor.dtype)} {list(tensor.shape)} where "
                    f"format {self.serializer.name!r} needs {type_name(expected.dtype)} {list(expected.shape)}"
                )
            tensors[key] = tensor
        return tensors

    def quantized(self, name: str) -> Quantized:
        """Codes, scales and offsets of a layer; a `CheckpointError` where values are invalid or not finite."""
        layer = self.layers[name]
        try:
            result = self.serializer.unpack(self.packed(name), layer.layer.columns, layer.size, layer.grid)
        except ValueError as error:
            raise CheckpointError(f"{self.folder}: {name}: {error}") from error
        if not (result.scale.isfinite().all() and result.offset.isfinite().all()):
            raise CheckpointError(f"{self.folder}: {name}: a scale or offset is not a finite number")
        return result

    def unpacked_tensors(self) -> Iterator[str]:
        """The names of all tensors that are no packed part of a quantized layer, biases among them."""
        packed = {f"{name}.{key}" for name, layer in self.layers.items() for key in self.serializer.pack(layer.empty())}
        return (name for name in self.tensors if name not in packed)

    def config(self) -> PretrainedConfig:
        """The model's configuration as if it was not quantized; a `CheckpointError` where there is none to use."""
        config = read_config(self.location)
        check_size(self.location, config, len(self.tensors))
        for entry in ("quantization_config", WEIGHTS_ENTRY):
            vars(config).pop(entry, None)
        return config


def open_checkpoint(folder: Path, registry: Registry | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """A result of dashq, or another program's checkpoint that a serializer recognises.

    `registry` has the serializers that can be; without one they are those of the installed plugins. Code that lies in
    the folder runs only with `trust_remote_code`. Raises `CheckpointError` for a folder that is neither, or not whole.
    """
    registry = registry or installed_registry()
    location = Location(folder, trust_remote_code=trust_remote_code)
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: {folder.absolute()}")
    if not (folder / REPORT).exists():
        for cls in registry.serializers.values():
            if recognised := cls.recognise(folder):
                return Checkpoint(
                    location=location,
                    serializer=cls(),
                    container=None,
                    layers={stored.layer.name: stored for stored in recognised},
                    tensors=_shards(folder),
                    recipe={},
                    report=None,
                )
        raise CheckpointError(f"{folder} is no finished result of dashq: it has no {REPORT}")
    report = read_report(folder)
    with refusing(f"{folder / RECIPE} is not as dashq writes it"):
        recipe = read_mapping(folder / RECIPE, yaml.safe_load)
    with refusing(f"{folder / CONFIG} is not as dashq writes it"):
        settings = read_mapping(folder / CONFIG).get("quantization_config")
    try:
        serializer = build_serializer(recipe["serializer"], registry, str(folder / RECIPE))
        layers = {layer.name: stored_layer(layer, serializer) for layer in report.layers}
    except (ValueError, KeyError, TypeError, PlanError) as error:
        raise CheckpointError(f"{folder / RECIPE} is not as dashq writes it: {cause(error)}") from error
    config = read_config(location)
    container = serializer.container(config)
    if container and report.tensors:  # earlier versions listed none; readers build the network of the configuration
        check_size(location, config, len(report.tensors))
    if isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD:
        try:
            DashqConfig(**settings)  # refuses other versions
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    return Checkpoint(
        location=location,
        serializer=serializer,
        container=container,
        layers=layers,
        tensors=_in_container(container, location, layers) if container else _shards(folder),
        recipe=recipe,
        report=report,
    )


def is_packed(folder: Path) -> bool:
    """True for a folder that `open_checkpoint` takes for a result or another program's packed weights."""
    return (folder / REPORT).exists() or any(cls.recognise(folder) for cls in installed_registry().serializers.values())


@without_progress_bars()
def open_network(
    folder: Path,
    dtype: torch.dtype,
    registry: Registry | None = None,
    trust_remote_code: bool = False,
    kernels: str = AUTO,
) -> PreTrainedModel:
    """The model in transformers with dashq's own layers, whatever format its weights are in.

    `kernels` multiply with packed layers, as `use_kernels` has them; a container's weights are plain once opened.
    Raises `CheckpointError` as `open_checkpoint` does, and where transformers does not open the model.
    """
    checkpoint = open_checkpoint(folder, registry, trust_remote_code)
    config = checkpoint.config()
    if checkpoint.container:
        with refusing(f"{folder} cannot be opened"):
            return _network_from_container(checkpoint, config, dtype)
    settings = quantization_config(checkpoint.serializer, checkpoint.layers.values())
    config.quantization_config = settings | {"serializer": checkpoint.serializer, "kernels": kernels}
    network = read_network(checkpoint.location, config=config, dtype=dtype)
    network.eval()
    return network


def _network_from_container(checkpoint: Checkpoint, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    network = network_of(config, checkpoint.location, dtype=dtype)
    network.eval().requires_grad_(False)
    state = {name: checkpoint.tensors[name][...] for name in checkpoint.unpacked_tensors()}
    matrices = dict(block_matrices(network))
    for name, stored in checkpoint.layers.items():
        if stored.layer.role != "linear":
            matrices[name] = Matrix(f"{name}.weight", transposed=False)
    quantized = {matrices[name].parameter for name in checkpoint.layers}
    missing = sorted(network.state_dict().keys() - state.keys() - quantized - tied_weights(network).keys())
    if missing:
        raise CheckpointError(f"{checkpoint.folder} lacks {len(missing)} tensors, the first is {missing[0]}")
    network.load_state_dict(state, strict=False)
    for name in checkpoint.layers:
        weight = network.get_parameter(matrices[name].parameter)
        matrices[name].of(weight).copy_(checkpoint.quantized(name).dequantize())
    return network


def _in_container(container: Container, location: Location, layers: Mapping[str, StoredLayer]) -> Mapping[str, Any]:
    folder = location.folder
    contents = Contents(folder=folder, layers=layers, trust_remote_code=location.trust_remote_code)
    return container.read(folder / container.file, contents)


def _shards(folder: Path) -> Mapping[str, Any]:
    shards = Shards(folder)
    return shards.lazy(list(shards.headers()))
