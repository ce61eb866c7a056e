"""A model's files opened: its configuration, the source of its weights, and the network without them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import PretrainedConfig, PreTrainedModel

from dashq.device import type_name
from dashq.errors import CheckpointError, refusing
from dashq.model.float8 import SETTINGS, Float8, float8_blocks
from dashq.model.gguf_source import Gguf, read_gguf_header
from dashq.model.loading import check_shape, check_size, network_of, read_config
from dashq.model.location import Location
from dashq.model.mappings import read_mapping
from dashq.model.source import WEIGHTS, WEIGHTS_INDEX, Shards, Source
from dashq.model.text_part import TextPart, text_config
from dashq.model.transformers_internals import no_init_weights, tied_weights

CONFIG, ADAPTER = "config.json", "adapter_config.json"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def open_files(location: Location, text_alone: Mapping[str, str]) -> tuple[Source, PreTrainedModel]:
    """The source of the model's weights, and the network on the meta device.

    Of models of the types in `text_alone` they are the text model's, and the sentence there says where the rest is.
    Raises a `CheckpointError` for whatever is wrong with the files; only their headers are read.
    """
    if location.gguf:
        # First of all, since transformers would say less clearly what is wrong with the file.
        header = read_gguf_header(location.folder / location.gguf)
        config = _read_configuration(location)
        check_size(location, config, len(header.tensors))
        # GGUF names no type for its dequantized values: float16 is what its blocks were scaled in.
        network = _empty_network(location, config, torch.float16)
        return Gguf(header, network), network
    config = _read_configuration(location)
    quantization = _take_quantization(config)
    block = float8_blocks(quantization, str(location)) if quantization else None
    source: Source = Shards(location.folder)
    check_size(location, config, len(source.headers()))
    if quantization:
        config.dtype = config.dtype if config.dtype in FLOATS else torch.bfloat16
        source = Float8(source, block, str(location), type_name(config.dtype))
    if config.model_type in text_alone:
        source, config = TextPart(source, text_alone[config.model_type]), text_config(config)
    return source, _empty_network(location, config, torch.float32)


def read_gguf_network(location: Location, dtype: torch.dtype) -> PreTrainedModel:
    """The network of a GGUF file with its weights, dequantized, on the CPU.

    Raises a `CheckpointError` where tensors are missing, or of other shapes than the file's metadata says.
    """
    source, network = open_files(location, {})
    tied, expected = tied_weights(network), network.state_dict()
    headers = {name: header for name, header in source.headers().items() if name not in tied}
    if missing := sorted(expected.keys() - headers.keys() - tied.keys()):
        raise CheckpointError(f"{location} lacks {len(missing)} tensors of its model, the first is {missing[0]}")
    for name, header in headers.items():
        check_shape(f"{location}: tensor {name}", header.shape, tuple(expected[name].shape))
    tensors = source.lazy([*headers])
    for name, tensor in tensors.items():
        network.load_state_dict({name: tensor[...].to(dtype)}, strict=False, assign=True)
    network.tie_weights()
    return network


def _read_configuration(location: Location) -> PretrainedConfig:
    """The model's configuration; a `CheckpointError` in one line for whatever is wrong with it."""
    if not location.gguf:
        _check_file(location)
    config = read_config(location)
    weights = str(getattr(config, "transformers_weights", None) or "")
    if weights.endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"{location}: `transformers_weights: {weights}` of {CONFIG} is not supported: name that file "
            f"{WEIGHTS}, or {WEIGHTS_INDEX} if it is an index, and take the entry out"
        )
    if weights and not any(hasattr(config, name) for name in SETTINGS):  # a sentence, as results of dashq have it
        raise CheckpointError(f"{location} is already quantized: {weights}")
    return config


def _check_file(location: Location) -> None:
    """Refuse a folder without a configuration, and a file that holds anything but an object."""
    path = location.folder / CONFIG
    if not path.exists() and (location.folder / ADAPTER).exists():
        raise CheckpointError(
            f"{location} holds {ADAPTER} and no {CONFIG}: an adapter without its model. Merge it into the model first "
            "(`merge_and_unload()` of peft, then `save_pretrained`), and quantize the folder that this makes"
        )
    with refusing(f"{location} holds no readable {CONFIG}"):
        read_mapping(path)


def _take_quantization(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """Take the settings of weights that are quantized already out of the configuration; None where there are none."""
    taken = None
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in SETTINGS:
            taken = vars(part).pop(name, None) or taken
    return taken


def _empty_network(location: Location, config: PretrainedConfig, default: torch.dtype) -> PreTrainedModel:
    """The network on the meta device, but for its buffers, in the configuration's type or the default."""
    with no_init_weights(), init_empty_weights(include_buffers=False):
        network = network_of(config, location, dtype=config.dtype or default)
    network.eval().requires_grad_(False)
    return network


def untie(location: Location, network: PreTrainedModel) -> PreTrainedModel:
    """The same network anew, in which embeddings and head are two whatever its configuration says."""
    config = network.config
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return _empty_network(location, config, network.dtype)


def warn_of_adapter(location: Location) -> Iterable[str]:
    """A sentence where an adapter lies beside the model."""
    if (location.folder / ADAPTER).exists():
        yield f"{ADAPTER} lies beside the model: its adapter is not applied and not in the result. Merge it first"
