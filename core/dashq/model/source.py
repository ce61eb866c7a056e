"""The source of a model's weights: the interface, and safetensors shards read one tensor at a time."""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dashq.errors import CheckpointError, one_line, refusing
from dashq.model.mappings import read_mapping

if TYPE_CHECKING:
    import transformers

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Header:
    """A tensor's shape and type as its file says; `dtype` is None where the values have to be unpacked first."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class Source(ABC):
    """The tensors of a checkpoint by their names in the files."""

    @property
    def notes(self) -> Iterable[str]:
        """Sentences on what is read otherwise than the files have it."""
        return ()

    @abstractmethod
    def headers(self) -> Mapping[str, Header]:
        """Every tensor's shape and type; no weight is read."""

    @abstractmethod
    def lazy(self, keys: list[str]) -> Mapping[str, Any]:
        """Handles that read a tensor when they are indexed with `[...]`; files close when the handles go."""

    @abstractmethod
    def conversions(self, network: "transformers.PreTrainedModel") -> list[Any]:
        """The transforms of transformers from the files' names and layouts to the network's parameters."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, read when it is indexed: whole with `[...]`, or one slice of its first axis.

    Read and not mapped: a mapped file that is cut meanwhile would kill the process.
    """

    path: Path
    start: int
    header: Header

    def __getitem__(self, index: Any) -> Tensor:
        dtype, shape = self.header.dtype, self.header.shape
        assert dtype is not None
        if index is ...:
            return read_bytes(self.path, self.start, dtype.itemsize * prod(shape)).view(dtype).reshape(shape)
        size = dtype.itemsize * prod(shape[1:])
        return read_bytes(self.path, self.start + index * size, size).view(dtype).reshape(shape[1:])


class Shards(Source):
    """The safetensors files that transformers would open: `model.safetensors`, or else the shards of its index.

    Other files in the folder are not read. A tensor that two of the files hold is refused.
    """

    def __init__(self, folder: Path) -> None:
        self._tensors: dict[str, StoredTensor] = {}
        for path in weight_files(folder):
            for key, tensor in read_tensors(path).items():
                if key in self._tensors:
                    raise CheckpointError(f"{folder}: both {self._tensors[key].path.name} and {path.name} hold {key}")
                self._tensors[key] = tensor
        self._headers = {key: tensor.header for key, tensor in self._tensors.items()}

    def headers(self) -> Mapping[str, Header]:
        return self._headers

    def lazy(self, keys: list[str]) -> Mapping[str, Any]:
        return {key: self._tensors[key] for key in keys}

    def conversions(self, network: "transformers.PreTrainedModel") -> list[Any]:
        from dashq.model.transformers_internals import get_model_conversion_mapping

        return get_model_conversion_mapping(network)


def check_index(folder: Path) -> None:
    """Raise a `CheckpointError` for an index of shards that is broken, or names files outside of its folder."""
    if not (folder / WEIGHTS).is_file() and (folder / WEIGHTS_INDEX).is_file():
        _indexed_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that transformers would open; a `CheckpointError` where there are none, or not all."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]  # as transformers does, whatever index lies beside it
    if (folder / WEIGHTS_INDEX).is_file():
        return _indexed_files(folder)
    names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"{folder} holds neither {WEIGHTS} nor {WEIGHTS_INDEX}, the files that transformers would open (pickled "
        f"weights are not read). Found: {names}"
    )


def indexed_names(index: Path) -> list[str]:
    """The names of the shards in an index, in order; a `CheckpointError` where it is not readable."""
    with refusing(f"{index} is not a readable index of shards"):
        names = read_mapping(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError("it needs a mapping `weight_map` from the names of tensors to those of files")
        return sorted({Path(name).as_posix() for name in names.values()})


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    paths = [folder / name for name in indexed_names(index)]
    for path in paths:
        # By the names alone: files of the hub's cache are links to a place outside the folder.
        if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
            raise CheckpointError(f"{index} names a shard outside its folder: {path}")
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        names = one_line(", ".join(missing))
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(paths)} shards: {names}")
    return paths


def read_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; a `CheckpointError` where it is broken."""
    try:
        with safe_open(path, framework="pt"):  # checks that header and values fit together
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length), object_pairs_hook=_without_repeats)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
    entries.pop("__metadata__", None)
    tensors = {}
    for key, entry in entries.items():
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise CheckpointError(f"{path}: the tensor {key} is of type {entry['dtype']}, which cannot be read")
        header = Header(tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[key] = StoredTensor(path, 8 + length + entry["data_offsets"][0], header)
    return tensors


def read_bytes(path: Path, start: int, count: int) -> UInt8[Tensor, "count"]:
    """A part of a file; a `CheckpointError` where the file is gone, or has been cut since its header was read."""
    values = torch.empty(count, dtype=torch.uint8)
    try:
        with path.open("rb") as file:
            file.seek(start)
            length = file.readinto(values.numpy().data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read any more: {error}") from error
    if length < count:
        raise CheckpointError(f"{path} was cut while it was read: {start + length} bytes, its header needs more")
    return values


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        name, count = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"its header names {name} {count} times")
    return entries
