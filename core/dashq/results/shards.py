"""Shards of safetensors: tensors wait in memory until a file is full, and a file on disk is never lost again."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dashq.data import size_of
from dashq.model.source import WEIGHTS, WEIGHTS_INDEX
from dashq.results.folder import JOURNAL, put_in_place, unfinished, write_json
from dashq.results.journal import Journal, Shard
from dashq.results.report import LayerReport

# Tensors wait in memory until this many bytes make a shard; a resumed run starts at the last shard's end.
SHARD_BYTES = 256 * 1024**2


class ShardWriter:
    """Writes the tensors of a run into shards and each shard into the journal.

    A shard is called `part-00001.safetensors` and so on until `name_shards` gives all of them their final names, which
    hold the number of shards.
    """

    def __init__(self, journal: Journal) -> None:
        self._folder, self._journal = journal.folder, journal
        self._tensors: dict[str, Tensor] = {}
        self._parts: list[str] = []
        self._layers: list[LayerReport] = []

    @property
    def finished_parts(self) -> set[str]:
        """The parts of the model that are on disk."""
        return {part for shard in self._journal.shards for part in shard.parts}

    @property
    def first_names(self) -> list[str]:
        """The shards' names while the run goes on."""
        return [self._first_name(number) for number in range(1, len(self._journal.shards) + 1)]

    @property
    def final_names(self) -> list[str]:
        """The shards' names in a result."""
        return [self._final_name(number) for number in range(1, len(self._journal.shards) + 1)]

    @property
    def layers(self) -> list[LayerReport]:
        """The reports of all layers so far, on disk or waiting."""
        return [*(layer for shard in self._journal.shards for layer in shard.layers), *self._layers]

    def add(self, part: str, tensors: Mapping[str, Shaped[Tensor, "..."]], layers: Iterable[LayerReport] = ()) -> None:
        """Take in one finished part of the model, on any device; writes a shard when enough has come together."""
        # A copy of its own: a view would keep the whole file that it was read from in memory.
        self._tensors |= {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        self._parts.append(part)
        self._layers += layers
        if size_of(self._tensors.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting as a shard."""
        if not self._parts:
            return
        path = self._folder / self._first_name(len(self._journal.shards) + 1)
        temporary = unfinished(path)
        self._journal.claim([path.name])
        save_file(self._tensors, temporary, metadata={"format": "pt"})
        # safetensors keeps its files to their owner; the journal is as open as the user wants files to be.
        shutil.copymode(self._folder / JOURNAL, temporary)
        put_in_place(temporary, path)
        size = size_of(self._tensors.values())
        self._journal.shards.append(Shard(tuple(self._parts), tuple(self._tensors), size, tuple(self._layers)))
        self._tensors, self._parts, self._layers = {}, [], []
        self._journal.save()

    def read(self, part: str) -> Mapping[str, Tensor]:
        """The tensors of the shard that holds a finished part."""
        return load_file(next(path for path, shard in self._files() if part in shard.parts))

    def handles(self) -> Mapping[str, Any]:
        """All tensors on disk by name, each read when it is indexed with `[...]`."""
        opened = [(safe_open(path, framework="pt"), shard) for path, shard in self._files()]
        return {name: file.get_slice(name) for file, shard in opened for name in shard.tensors}

    def name_shards(self) -> None:
        """Give the shards their final names, and several of them an index."""
        weight_map: dict[str, str] = {}
        self._journal.claim([WEIGHTS_INDEX, *self.final_names])
        for number, (path, shard) in enumerate(self._files(), start=1):
            name = self._final_name(number)
            put_in_place(path, self._folder / name)
            weight_map |= dict.fromkeys(shard.tensors, name)
        if len(self._journal.shards) > 1:
            total = sum(shard.bytes for shard in self._journal.shards)
            write_json(self._folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def remove(self) -> None:
        """Remove the shards, whose tensors lie in one file now."""
        for name in self.first_names:
            (self._folder / name).unlink()

    def _files(self) -> list[tuple[Path, Shard]]:
        """Every shard with its file, which has its final name already where a run was interrupted late."""
        files = []
        for number, shard in enumerate(self._journal.shards, start=1):
            path = self._folder / self._first_name(number)
            files.append((path if path.exists() else self._folder / self._final_name(number), shard))
        return files

    def _first_name(self, number: int) -> str:
        return f"part-{number:05}.safetensors"

    def _final_name(self, number: int) -> str:
        count = len(self._journal.shards)
        return f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else WEIGHTS
