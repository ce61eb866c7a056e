"""Weights in a GGUF file, dequantized one tensor at a time under their transformers names."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dashq.errors import CheckpointError, refusing
from dashq.model.gguf_layout import ARCHITECTURES, TABLES, GgufLayout
from dashq.model.source import Header, Source, read_bytes
from dashq.model.transformers_internals import read_gguf_table

PLAIN_DTYPES: Mapping[int, torch.dtype] = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
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
    """One parameter, whose parts in the file are read and dequantized when it is indexed."""

    path: Path
    parts: tuple[TableEntry, ...]
    parameter: str
    layout: GgufLayout

    @property
    def header(self) -> Header:
        """Its shape, and its type where the file holds it as it is."""
        empty = [torch.empty(part.shape, device="meta") for part in self.parts]
        tensor = self.layout.from_file(self.parameter, empty)
        shape = tuple((tensor.mT if self.layout.transposed(self.parameter) else tensor).shape)
        return Header(shape, PLAIN_DTYPES.get(self.parts[0].kind))

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self.layout.from_file(self.parameter, [self._values(part) for part in self.parts])
        return tensor.mT if self.layout.transposed(self.parameter) else tensor

    def _values(self, stored: TableEntry) -> Tensor:
        packed = read_bytes(self.path, stored.start, stored.size)
        if stored.kind in PLAIN_DTYPES:
            values = packed.view(PLAIN_DTYPES[stored.kind])
        else:
            values = torch.from_numpy(gguf.dequantize(packed.numpy(), stored.kind))
        return values.reshape(stored.shape)


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
        layout = GgufLayout(header.architecture, network.config)
        names = {key: names for key in network.state_dict() if (names := layout.names(key))}
        tensors = {tensor.name: tensor for tensor in header.tensors}
        if homeless := sorted(tensors.keys() - {*chain(*names.values()), *TABLES}):
            raise CheckpointError(
                f"{header.path}: the {header.architecture} of transformers, as this file configures it, has no place "
                f"for {len(homeless)} of its tensors, such as {homeless[0]}. Use the model's safetensors"
            )
        self._tensors = {
            key: LazyTensor(header.path, tuple(tensors[part] for part in parts), key, layout)
            for key, parts in names.items()
            if all(part in tensors for part in parts)
        }

    def headers(self) -> Mapping[str, Header]:
        return {key: tensor.header for key, tensor in self._tensors.items()}

    def lazy(self, keys: list[str]) -> Mapping[str, Any]:
        return {key: self._tensors[key] for key in keys}

    def conversions(self, network: PreTrainedModel) -> list[Any]:
        return []
