"""Shards of safetensors: tensors wait in memory until a file is full, and in smaller files where they can be found."""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dashq.data import size_of
from dashq.errors import OutputError
from dashq.model.source import WEIGHTS, WEIGHTS_INDEX, read_tensors
from dashq.results.files import put_in_place, remove_files, write_json, writing
from dashq.results.fingerprint import tensor_digest
from dashq.results.journal import Journal, Shard

# Tensors wait in memory until this many bytes make a shard.
SHARD_BYTES = 256 * 1024**2
# What waits is written at the end of a part before the next one could end later than this many seconds after the last
# time: no stop costs more than that, or than one part where that takes longer.
PIECE_SECONDS = 60.0


Tensors = Mapping[str, Shaped[Tensor, "..."]]
Records = Iterable[Mapping[str, Any]]
CHANGED = "tuned"  # the first word of shards that were changed


class ShardWriter:
    """Writes the tensors of a run into shards, and each shard into the journal.

    A shard is called `part-00001.safetensors` and so on until `name_shards` gives all of them their final names, which
    hold the number of shards. Tensors that wait for a shard to fill lie in pieces, `piece-00001.safetensors` and so on.
    """

    def __init__(self, journal: Journal, first_word: str = "part") -> None:
        self._folder, self._journal, self._first_word = journal.folder, journal, first_word
        self._tensors: dict[str, Tensor] = {}  # those of the pieces, and those that are in none
        self._unsaved: list[str] = []  # the names of the latter
        self._parts: list[str] = []
        self._records: list[Mapping[str, Any]] = []
        self._saved_at = self._added_at = time.monotonic()

    def resume(self, earlier: Iterable[str], overwrite: bool, kept: Iterable[str] = ()) -> None:
        """Take over what the journal says is on disk, and remove the other files of `earlier` runs.

        Of a run that is resumed, the files of tensors that are to be `kept` stay as well. Raises an `OutputError` that
        names what is not as it was written, unless the run is overwritten.
        """
        try:
            for shard in self._journal.shards:
                self._read_all(shard)
            for piece in self._journal.pieces:
                self._tensors |= self._read_all(piece)
            for path in (self._folder / name for name in kept):
                if self._on_disk and path.exists():
                    self._read_from(path, ())
        except OutputError:
            if not overwrite:
                raise
            self._tensors = {}
            self._journal.shards.clear()
            self._journal.pieces.clear()
        live = {self._path(shard).name for shard in self._on_disk}
        self._journal.clean(earlier, live | {*kept} if live else live)

    @property
    def finished_parts(self) -> set[str]:
        """The parts of the model that are on disk."""
        return {part for shard in self._on_disk for part in shard.parts}

    @property
    def first_names(self) -> list[str]:
        """The shards' names while the run goes on."""
        return [shard.file for shard in self._journal.shards]

    @property
    def final_names(self) -> list[str]:
        """The shards' names in a result."""
        return [self._final_name(number) for number in range(1, len(self._journal.shards) + 1)]

    @property
    def records(self) -> list[Mapping[str, Any]]:
        """The records of all parts so far, on disk or waiting."""
        return [*(record for shard in self._on_disk for record in shard.records), *self._records]

    @property
    def digests(self) -> dict[str, str]:
        """The digests of all tensors on disk, by name."""
        return {name: digest for shard in self._on_disk for name, digest in shard.tensors.items()}

    def add(
        self, part: str, tensors: Mapping[str, Shaped[Tensor, "..."]], records: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Take in one finished part of the model, on any device; writes it when enough has come together, or waited.

        The records are plain data.
        """
        now = time.monotonic()
        expected = now + (now - self._added_at)  # the end of the next part, if it takes as long as this one
        self._added_at = now
        # A copy of its own: a view would keep the whole file that it was read from in memory.
        self._tensors |= {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        self._unsaved += tensors
        self._parts.append(part)
        self._records += records
        if size_of(self._tensors.values()) >= SHARD_BYTES:
            self.flush()
        elif expected - self._saved_at >= PIECE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the parts that are in no file yet, as a piece of the shard to be."""
        if not self._parts:
            return
        name = f"{self._first_word}-{len(self._journal.shards) + 1:05}-piece-{len(self._journal.pieces) + 1:05}"
        tensors = {key: self._tensors[key] for key in self._unsaved}
        self._journal.pieces.append(self._save(f"{name}.safetensors", tensors, self._parts, self._records))
        self._forget_saved()

    def flush(self) -> None:
        """Write what is waiting as a shard, in the place of its pieces."""
        pieces = list(self._journal.pieces)
        if not (pieces or self._parts):
            return
        parts = [*(part for piece in pieces for part in piece.parts), *self._parts]
        records = [*(record for piece in pieces for record in piece.records), *self._records]
        name = self._first_name(len(self._journal.shards) + 1)
        self._journal.shards.append(self._save(name, self._tensors, parts, records))
        self._journal.pieces.clear()
        self._tensors = {}
        self._forget_saved()
        remove_files(self._folder, [piece.file for piece in pieces])

    def read(self, part: str, prefix: str) -> Mapping[str, Tensor]:
        """The tensors of a finished part whose names begin with a prefix."""
        shard = next(shard for shard in self._on_disk if part in shard.parts)
        return self._read(shard, [name for name in shard.tensors if name.startswith(prefix)])

    def handles(self) -> Mapping[str, Any]:
        """All tensors of shards by name, each read and not mapped when it is indexed with `[...]`."""
        files = [read_tensors(self._path(shard)) for shard in self._journal.shards]
        return {name: tensor for tensors in files for name, tensor in tensors.items()}

    def change(self, change: Callable[[Tensors, Records], tuple[Tensors, Records]]) -> None:
        """Write each shard with other tensors and records of the same parts.

        One is replaced after the other: those that were replaced before an interruption are left as they are.
        """
        for index, shard in enumerate(self._journal.shards):
            name = self._first_name(index + 1, CHANGED)
            if shard.file != name:
                self._journal.shards[index] = self._changed(shard, name, change)
                self._journal.save()
                remove_files(self._folder, [shard.file])

    def _changed(self, shard: Shard, name: str, change: Callable[[Tensors, Records], tuple[Tensors, Records]]) -> Shard:
        """The shard written anew; its tensors are in memory no longer than this takes."""
        tensors, records = change(self._read(shard, shard.tensors), shard.records)
        return self._save(name, dict(tensors), shard.parts, records)

    def name_shards(self) -> None:
        """Give the shards their final names, and several of them an index."""
        weight_map: dict[str, str] = {}
        self._journal.claim([WEIGHTS_INDEX, *self.final_names])
        for shard, name in zip(self._journal.shards, self.final_names, strict=True):
            put_in_place(self._path(shard), self._folder / name)
            weight_map |= dict.fromkeys(shard.tensors, name)
        if len(self._journal.shards) > 1:
            total = sum(shard.bytes for shard in self._journal.shards)
            write_json(self._folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def remove(self) -> None:
        """Remove the shards, whose tensors lie in one file now, or are not needed any more."""
        remove_files(self._folder, [shard.file for shard in self._on_disk])

    @property
    def _on_disk(self) -> list[Shard]:
        return [*self._journal.shards, *self._journal.pieces]

    def _forget_saved(self) -> None:
        self._unsaved, self._parts, self._records = [], [], []
        self._journal.save()
        self._saved_at = time.monotonic()

    def _save(
        self,
        name: str,
        tensors: dict[str, Shaped[Tensor, "..."]],
        parts: Iterable[str],
        records: Iterable[Mapping[str, Any]],
    ) -> Shard:
        """Write a file of tensors, all or nothing."""
        self._journal.claim([name])
        with writing(self._folder / name) as temporary:
            try:
                save_file(tensors, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                raise OutputError(f"cannot write {self._folder / name}: {error}") from error
            # safetensors keeps its files to their owner; the journal is as open as the user wants files to be.
            shutil.copymode(self._folder / self._journal.name, temporary)
        digests = {key: tensor_digest(tensor) for key, tensor in tensors.items()}
        return Shard(name, tuple(parts), digests, size_of(tensors.values()), tuple(records))

    def _read(self, shard: Shard, names: Iterable[str]) -> dict[str, Tensor]:
        return self._read_from(self._path(shard), names)

    def _read_from(self, path: Path, names: Iterable[str]) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise OutputError(
                f"{path} is not as the interrupted run wrote it; --overwrite discards the run: {error}"
            ) from error

    def _read_all(self, shard: Shard) -> dict[str, Tensor]:
        """All tensors of a file, compared with their digests."""
        tensors = self._read(shard, shard.tensors)
        for name, tensor in tensors.items():
            if tensor_digest(tensor) != shard.tensors[name]:
                raise OutputError(
                    f"{self._path(shard)} is not as the interrupted run wrote it; --overwrite discards the run: "
                    f"the tensor {name} has changed"
                )
        return tensors

    def _path(self, shard: Shard) -> Path:
        """The file of a shard, which has its final name already where a run was interrupted late."""
        path = self._folder / shard.file
        names = dict(zip(self.first_names, self.final_names, strict=True))
        return path if path.exists() else self._folder / names.get(shard.file, shard.file)

    def _first_name(self, number: int, first_word: str = "") -> str:
        return f"{first_word or self._first_word}-{number:05}.safetensors"

    def _final_name(self, number: int) -> str:
        count = len(self._journal.shards)
        return f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else WEIGHTS
