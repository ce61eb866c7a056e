"""The journal of an unfinished run: what it is made from, and which tensors are on disk, so that it can be resumed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from dashq.errors import OutputError
from dashq.results.clock import Clock
from dashq.results.files import UNFINISHED, read_sealed, remove_files, write_sealed
from dashq.results.fingerprint import differences
from dashq.results.folder import JOURNAL
from dashq.strict import first_mistake


@dataclass(frozen=True)
class Shard:
    """One file of tensors on disk: its name, the parts of the model in it, and its bytes.

    `tensors` are the digests of its tensors by name, `records` what is to be said of the parts, as plain data.
    """

    file: str
    parts: tuple[str, ...]
    tensors: Mapping[str, str]
    bytes: int
    records: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class _Entries:
    """The content of the file."""

    recipe: dict[str, Any]
    inputs: dict[str, str]
    threads: list[int]
    seconds: dict[str, float]
    shards: list[Shard]
    pieces: list[Shard]
    files: list[str]


_ENTRIES = TypeAdapter(_Entries)


def parts_on_disk(path: Path) -> set[str]:
    """The parts of the model that are on disk by the journal at `path`; none where there is no valid one."""
    try:
        entries = _ENTRIES.validate_python(read_sealed(path))
    except (OSError, ValueError):
        return set()
    return {part for shard in (*entries.shards, *entries.pieces) for part in shard.parts}


@dataclass(frozen=True)
class Journal:
    """The tensors on disk of one run of a `recipe` with these `inputs`, in the order in which they were written.

    `shards` hold as many parts as files of a result do, `pieces` those that wait for a shard to fill. `files` are the
    names of all files in the folder that this run, or an earlier one, wrote or was about to write. `threads` are the
    numbers of threads that it was computed with.
    """

    folder: Path
    recipe: Mapping[str, Any]
    inputs: Mapping[str, str]
    clock: Clock
    name: str = JOURNAL
    shards: list[Shard] = field(default_factory=list)
    pieces: list[Shard] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    threads: list[int] = field(default_factory=list)

    def resume(self, overwrite: bool) -> None:
        """Take over what an interrupted run of the same recipe, with the same inputs, has left in the folder.

        Raises an `OutputError` that says what differs, or that the journal is broken, unless the run is overwritten.
        """
        path = self.folder / self.name
        if path.exists():
            entries = None
            try:
                entries = _ENTRIES.validate_python(read_sealed(path))
                refusal = self._refusal(entries)
            except (OSError, ValueError) as error:
                reason = first_mistake(error) if isinstance(error, ValidationError) else error
                refusal = f"{path} is not as dashq writes it; --overwrite discards the run: {reason}"
            if entries and not refusal:
                self.shards.extend(entries.shards)
                self.pieces.extend(entries.pieces)
                self.threads.extend(entries.threads)
                for phase, seconds in entries.seconds.items():
                    self.clock.seconds[phase] += seconds
            elif not overwrite:
                raise OutputError(refusal)
        if (threads := torch.get_num_threads()) not in self.threads:
            self.threads.append(threads)

    def clean(self, earlier: Iterable[str], live: Iterable[str]) -> None:
        """Remove the files of earlier runs, but the `live` ones, which this one resumes from."""
        self.claim({*earlier, *live})  # ours, also while they are being removed
        unfinished = {f"{name}{UNFINISHED}" for name in live}
        remove_files(self.folder, self.files.difference(live, [self.name]) | unfinished)
        self.files.intersection_update(live)
        self.save()

    def save(self) -> None:
        """Write the journal, all or nothing."""
        content = _Entries(
            recipe=dict(self.recipe),
            inputs=dict(self.inputs),
            threads=self.threads,
            seconds=dict(self.clock.seconds),
            shards=self.shards,
            pieces=self.pieces,
            files=sorted(self.files),
        )
        write_sealed(self.folder / self.name, _ENTRIES.dump_python(content), indent=None)  # after each part

    def claim(self, names: Iterable[str]) -> None:
        """Note files before they are written, so that no stop leaves one that nobody knows."""
        self.files.update(names)
        self.save()

    def remove(self) -> None:
        """Let the journal go: the run is finished."""
        (self.folder / self.name).unlink()

    def _refusal(self, entries: _Entries) -> str:
        """The reason why the run that left these entries is not this one; empty where it is."""
        if entries.recipe != self.recipe:
            return (
                f"{self.folder} holds an unfinished run of a different recipe; --overwrite discards it, "
                "and the recipe that it was started with goes on with it"
            )
        changes = differences(entries.inputs, self.inputs)
        if changes:
            return (
                f"{self.folder} holds an unfinished run that was made from something else; --overwrite discards it: "
                + "; ".join(changes)
            )
        return ""
