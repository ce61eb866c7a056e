"""The one place for names of transformers that it does not promise to keep."""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.initialization import no_init_weights
from transformers.integrations.gguf import reader
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import LoadStateDictConfig

__all__ = [
    "WeightConverter",
    "can_unpack",
    "destinations",
    "fill",
    "gated_product",
    "get_model_conversion_mapping",
    "has_stacks_transposed",
    "initialize",
    "no_init_weights",
    "normalizes_outputs",
    "read_gguf_settings",
    "read_gguf_table",
    "read_gguf_vectors",
    "tie_again",
    "tied_weights",
    "untie",
]


class _Part:
    """A network that lists the parameters of one part alone; in all else it is the whole network.

    transformers lists all of them whenever tensors are read, which for each block of many takes the longest time.
    """

    def __init__(self, network: PreTrainedModel, parameters: Mapping[str, Any]) -> None:
        self._network, self._parameters = network, parameters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def state_dict(self) -> Mapping[str, Any]:
        return self._parameters

    def named_buffers(self) -> Iterable[tuple[str, Any]]:
        return ()  # only asked for where weights are offloaded to the disk


def fill(
    network: PreTrainedModel, parameters: Mapping[str, Any], tensors: Mapping[str, Any], conversions: Sequence[Any]
) -> list[str]:
    """Read `tensors`, named as in the files, into the `parameters` that the conversions lead to; returns the errors.

    Tensors are read when they are indexed, one after the other; conversions are not changed.
    """
    config = LoadStateDictConfig(dtype=network.dtype, weight_mapping=copy.deepcopy(list(conversions)))
    part: Any = _Part(network, parameters)
    info, _ = convert_and_load_state_dict_in_model(part, dict(tensors), config)
    return [str(errors) for errors in (info.conversion_errors, info.error_msgs) if errors]


@dataclass(frozen=True)
class Destination:
    """The parameter that a tensor of the files belongs to, and whether its values are `converted` on the way."""

    parameter: str
    converted: bool


def destinations(keys: Iterable[str], network: PreTrainedModel, conversions: Sequence[Any]) -> dict[str, Destination]:
    """The parameter that each tensor belongs to, by its name in the files."""
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    expected = network.state_dict(keep_vars=True)
    places: dict[str, Destination] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, network.base_model_prefix, expected)
        places[key] = Destination(name, converted=pattern is not None)
    return places


def tied_weights(network: PreTrainedModel) -> Mapping[str, str]:
    """The parameters that share their values with another one, by name, each with the name of the other."""
    tied: Mapping[str, str] = network.all_tied_weights_keys
    return tied


def untie(network: PreTrainedModel, name: str) -> None:
    """Let the parameter of that name share its values no more, as far as transformers knows."""
    internals: Any = network
    internals.all_tied_weights_keys.pop(name)
    internals._tied_weights_keys = dict(internals.all_tied_weights_keys)


def tie_again(network: PreTrainedModel) -> None:
    """Let all parameters that were untied share their values again."""
    internals: Any = network
    vars(network).pop("_tied_weights_keys", None)  # those of the class are left
    internals.all_tied_weights_keys = network.get_expanded_tied_weights_keys(all_submodels=True)
    network.tie_weights()


def gated_product(experts: nn.Module, y: Float[Tensor, "tokens rows"]) -> Float[Tensor, "tokens inner"]:
    """The product of the two halves of what the first matrix of a gated expert gives, as the model's module has it."""
    module: Any = experts
    if hasattr(module, "_apply_gate"):
        result: Tensor = module._apply_gate(y)
    else:
        gate, up = y.chunk(2, dim=-1)
        result = module.act_fn(gate) * up
    return result


def has_stacks_transposed(experts: nn.Module) -> bool:
    """True where a module of stacked experts says that their matrices are [columns, rows]."""
    return bool(getattr(experts, "is_transposed", False))


def normalizes_outputs(experts: nn.Module) -> bool:
    """True where a module of stacked experts normalizes their outputs before it adds them up."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def read_gguf_settings(path: str) -> Mapping[str, Any]:
    """The settings of a model in a GGUF file, by key; of an array of texts, their number."""
    settings: Mapping[str, Any] = reader.read_gguf_metadata(path)[0]
    return settings


def read_gguf_table(path: str) -> tuple[str, list[tuple[str, tuple[int, ...], int, int]], int]:
    """A GGUF file's architecture, its tensors, and the place in the file that their offsets count from.

    Tensors have their names, shapes, types as numbers and offsets; types that transformers does not read are there too.
    """
    blob = reader._mapped(path)
    metadata, count, position = reader._read_metadata(blob, path)
    tensors, end = reader._read_tensor_table(blob, count, position)
    alignment = metadata.get("general.alignment", 32)
    return metadata["general.architecture"], tensors, -(-end // alignment) * alignment


def read_gguf_vectors(path: str, names: Collection[str]) -> Mapping[str, Float[Tensor, " _"]]:
    """Those of the named tensors that a GGUF file holds, which are vectors in float32."""
    _, table, start = read_gguf_table(path)
    places = {name: (shape, start + offset) for name, shape, _, offset in table if name in names}
    return {
        name: torch.from_numpy(numpy.fromfile(path, numpy.float32, shape[0], offset=offset))
        for name, (shape, offset) in places.items()
    }


def rotary_frequencies(kind: str, config: Any) -> tuple[Float[Tensor, " frequencies"], float]:
    """The frequencies of rotary embeddings of this kind for short texts, and the factor of what they turn.

    Those of layers without a window where others have parameters of their own.
    """
    layers = "full_attention" if "full_attention" in config.rope_parameters else None
    frequencies: Tensor
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layers)
    return frequencies, float(factor)


def initialize(module: nn.Module, model: PreTrainedModel) -> None:
    """Fill a module as the model does before its weights are read, constants that lie in no file among them."""
    model._init_weights(module)


def can_unpack(settings: dict[str, Any]) -> bool:
    """True where the packages that transformers opens weights with, quantized by these `settings`, are installed."""
    from transformers.quantizers.auto import AutoHfQuantizer  # its import registers ours, which imports this module

    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment()
    except (ImportError, RuntimeError):  # the latter where a graphics processor is missing
        return False
    return True
