"""Weights in a GGUF file, dequantized one tensor at a time under their transformers names."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dashq.errors import CheckpointError, refusing
from dashq.model.source import Header, Source, read_bytes
from dashq.model.transformers_internals import read_gguf_table

PLAIN_DTYPES: Mapping[int, torch.dtype] = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
Mend = Callable[[Tensor, str, PretrainedConfig], Tensor]


def _unchanged(weight: Float[Tensor, "*shape"], name: str, config: PretrainedConfig) -> Float[Tensor, "*shape"]:
    return weight


def _split_rotary_halves(
    weight: Float[Tensor, "*shape"], name: str, config: PretrainedConfig
) -> Float[Tensor, "*shape"]:
    # llama.cpp interleaves the two halves that rotary embeddings turn; transformers keeps them apart.
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _subtract_one_from_norms(
    weight: Float[Tensor, "*shape"], name: str, config: PretrainedConfig
) -> Float[Tensor, "*shape"]:
    # llama.cpp stores the factor, Gemma's modules add 1 to what they hold.
    return weight - 1 if name.endswith("norm.weight") else weight


# Functions that undo, after reading, how llama.cpp stores tensors, by the architecture that the file names.
ARCHITECTURES: Mapping[str, Mend] = {
    "llama": _split_rotary_halves,
    "qwen2": _unchanged,
    "qwen3": _unchanged,
    "phi3": _unchanged,
    "gemma2": _subtract_one_from_norms,
    "gemma3": _subtract_one_from_norms,
}


@dataclass(frozen=True)
class TableEntry:
    """A tensor's place in a GGUF file: its first byte, their number, and the type that they are packed in."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """All of a GGUF file but the values of its tensors and its vocabulary."""

    path: Path
    architecture: str
    tensors: tuple[TableEntry, ...]


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of the file, read and dequantized when it is indexed."""

    path: Path
    stored: TableEntry
    mend: Mend
    config: PretrainedConfig

    def __getitem__(self, index: Any) -> Tensor:
        stored = self.stored
        packed = read_bytes(self.path, stored.start, stored.size)
        if stored.kind in PLAIN_DTYPES:
            values = packed.view(PLAIN_DTYPES[stored.kind])
        else:
            values = torch.from_numpy(gguf.dequantize(packed.numpy(), stored.kind))
        return self.mend(values.reshape(stored.shape), stored.name, self.config)


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file; `CheckpointError` where it is not whole, or of a kind that is not known."""
    with refusing(f"{path} is truncated or not a GGUF file"):  # the parser trusts its input, and fails in any way
        architecture, table, start = read_gguf_table(str(path))
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: cannot read GGUF files of architecture {architecture!r}. Known: {known}")
    tensors = [_tensor(path, name, shape, number, start + offset) for name, shape, number, offset in table]
    names = Counter(tensor.name for tensor in tensors)
    if len(names) < len(tensors):
        raise CheckpointError("{} holds the tensor {} {} times".format(path, *names.most_common(1)[0]))
    needed = max((tensor.start + tensor.size for tensor in tensors), default=0)
    if path.stat().st_size < needed:
        raise CheckpointError(f"{path} is truncated: {path.stat().st_size} bytes, its header needs {needed}")
    return GgufHeader(path, architecture, tuple(tensors))


def _tensor(path: Path, name: str, shape: tuple[int, ...], number: int, start: int) -> TableEntry:
    kinds = _readable_kinds()
    if number not in kinds:
        known = ", ".join(kind.name for kind in kinds.values())
        words = next((kind.name for kind in gguf.GGMLQuantizationType if kind == number), f"number {number}")
        raise CheckpointError(f"{path}: the tensor {name} is of type {words}, which cannot be read. Known: {known}")
    length, size = gguf.GGML_QUANT_SIZES[kinds[number]]
    if not shape or shape[-1] % length:
        raise CheckpointError(f"{path}: the tensor {name} of shape {list(shape)} is not made of blocks of {length}")
    return TableEntry(name, shape, kinds[number], start, prod(shape) // length * size)


@cache
def _readable_kinds() -> Mapping[int, gguf.GGMLQuantizationType]:
    """The types that the gguf package dequantizes, by number; it is asked for one block of zeros of each."""
    kinds = {}
    for kind in gguf.GGMLQuantizationType:
        with suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            kinds[int(kind)] = kind
    return kinds


class Gguf(Source):
    """One GGUF file of an architecture in `ARCHITECTURES`."""

    def __init__(self, header: GgufHeader, network: PreTrainedModel) -> None:
        self._path = header.path
        self._mend = ARCHITECTURES[header.architecture]
        self._config = network.config
        names = _names_in_file(network, header.architecture)
        tensors = {tensor.name: tensor for tensor in header.tensors}
        if homeless := sorted(tensors.keys() - names.values()):
            raise CheckpointError(
                f"{header.path}: the {header.architecture} of transformers, as this file configures it, has no place "
                f"for {len(homeless)} of its tensors, such as {homeless[0]}. Use the model's safetensors"
            )
        self._tensors = {key: tensors[name] for key, name in names.items() if name in tensors}

    def headers(self) -> Mapping[str, Header]:
        return {key: Header(tensor.shape, PLAIN_DTYPES.get(tensor.kind)) for key, tensor in self._tensors.items()}

    def lazy(self, keys: list[str]) -> Mapping[str, Any]:
        return {key: LazyTensor(self._path, self._tensors[key], self._mend, self._config) for key in keys}

    def conversions(self, network: PreTrainedModel) -> list[Any]:
        return []


def _names_in_file(network: PreTrainedModel, architecture: str) -> Mapping[str, str]:
    """The file's name of every parameter that GGUF knows."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, network.config.num_hidden_layers)
    names = {key: known.get_name(key, try_suffixes=(".weight", ".bias")) for key in network.state_dict()}
    return {key: name for key, name in names.items() if name is not None}
