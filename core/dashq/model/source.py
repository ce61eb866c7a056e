"""The source of a model's weights: the interface, and safetensors shards read one tensor at a time."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from dashq.errors import CheckpointError

if TYPE_CHECKING:
    import transformers

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Header:
    """A tensor's shape and type as its file says; `dtype` is None where the values have to be unpacked first."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


class Source(ABC):
    """The tensors of a checkpoint by their names in the files."""

    @abstractmethod
    def headers(self) -> Mapping[str, Header]:
        """Every tensor's shape and type; no weight is read."""

    @abstractmethod
    def lazy(self, keys: list[str]) -> Mapping[str, Any]:
        """Handles that read a tensor when they are indexed with `[...]`; files close when the handles go."""

    @abstractmethod
    def conversions(self, network: "transformers.PreTrainedModel") -> list[Any]:
        """The transforms of transformers from the files' names and layouts to the network's parameters."""


class Shards(Source):
    """The safetensors files that transformers would open: `model.safetensors`, or else the shards of its index.

    Other files in the folder are not read. A tensor that two of the files hold is refused.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._headers: dict[str, Header] = {}
        for path in _weight_files(folder):
            for key, header in read_headers(path).items():
                if key in self._files:
                    raise CheckpointError(f"{folder}: both {self._files[key].name} and {path.name} hold {key}")
                self._files[key], self._headers[key] = path, header

    def headers(self) -> Mapping[str, Header]:
        return self._headers

    def lazy(self, keys: list[str]) -> Mapping[str, Any]:
        # Opened anew for each block: what is mapped into memory goes when the block goes.
        opened = {path: safe_open(path, framework="pt") for path in {self._files[key] for key in keys}}
        return {key: opened[self._files[key]].get_slice(key) for key in keys}

    def conversions(self, network: "transformers.PreTrainedModel") -> list[Any]:
        from dashq.model.transformers_internals import get_model_conversion_mapping

        return get_model_conversion_mapping(network)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]  # as transformers does, whatever index lies beside it
    if (folder / WEIGHTS_INDEX).is_file():
        return _indexed_files(folder)
    names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"{folder} holds neither {WEIGHTS} nor {WEIGHTS_INDEX}, the files that transformers would open (pickled "
        f"weights are not read). Found: {names}"
    )


def _indexed_files(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    try:
        paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not a readable index of shards: {error!r}") from error
    for path in paths:
        # By the names alone: files of the hub's cache are links to a place outside the folder.
        if not path.is_relative_to(folder) or ".." in path.relative_to(folder).parts:
            raise CheckpointError(f"{index} names a shard outside its folder: {path}")
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(paths)} shards: {', '.join(missing)}")
    return paths


def read_headers(path: Path) -> dict[str, Header]:
    """The tensors of one safetensors file; a `CheckpointError` where it is broken."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            return {
                key: Header(tuple(piece.get_shape()), SAFETENSORS_DTYPES.get(piece.get_dtype()))
                for key, piece in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error
