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
    """One safetensors file, or several with an index."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._headers: dict[str, Header] = {}
        for path in _shard_paths(folder):
            for key, header in read_headers(path).items():
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


def _shard_paths(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is not a readable index of shards: {error!r}") from error
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise CheckpointError(f"{folder} lacks {len(missing)} of {len(paths)} shards: {', '.join(missing)}")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise CheckpointError(f"{folder} holds no .safetensors file (pickled weights are not read). Found: {names}")
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
