"""Weights in a GGUF file, dequantized one tensor at a time under their transformers names."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dashq.errors import CheckpointError, refusing
from dashq.model.gguf_layout import GgufLayout
from dashq.model.source import Header, Source, read_bytes
from dashq.model.transformers_internals import read_gguf_table

PLAIN_DTYPES: Mapping[int, torch.dtype] = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3")  # those that are known to be read right


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
    parameter: str
    layout: GgufLayout

    def __getitem__(self, index: Any) -> Tensor:
        stored = self.stored
        packed = read_bytes(self.path, stored.start, stored.size)
        if stored.kind in PLAIN_DTYPES:
            values = packed.view(PLAIN_DTYPES[stored.kind])
        else:
            values = torch.from_numpy(gguf.dequantize(packed.numpy(), stored.kind))
        return self.layout.from_file(self.parameter, values.reshape(stored.shape))


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
        name, count = names.most_common(1)[0]
        raise CheckpointError(f"{path} holds the tensor {name} {count} times")
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
        self._layout = GgufLayout(header.architecture, network.config)
        names = {key: name for key in network.state_dict() if (name := self._layout.name(key)) is not None}
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
        return {key: LazyTensor(self._path, self._tensors[key], key, self._layout) for key in keys}

    def conversions(self, network: PreTrainedModel) -> list[Any]:
        return []
