"""The journal of an unfinished run: which shards are on disk, so that the run can be resumed after the last one."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dashq.errors import OutputError
from dashq.results.clock import Clock
from dashq.results.folder import JOURNAL, write_json
from dashq.results.report import REPORT, LayerReport


@dataclass(frozen=True)
class Shard:
    """One file of tensors on disk: the parts of the model in it, its tensors' names, its layers, and its bytes."""

    parts: tuple[str, ...]
    tensors: tuple[str, ...]
    bytes: int
    layers: tuple[LayerReport, ...]


@dataclass(frozen=True)
class _Entries:
    """The content of the file."""

    recipe: dict[str, Any]
    seconds: dict[str, float]
    shards: tuple[Shard, ...]


_ENTRIES = TypeAdapter(_Entries)


@dataclass(frozen=True)
class Journal:
    """The shards of one run of a `recipe`, in the order in which they were written; on disk after `save`.

    `files` are the names of all files in the folder that this run, or an earlier one, wrote or was about to write.
    """

    folder: Path
    recipe: Mapping[str, Any]
    clock: Clock
    shards: list[Shard] = field(default_factory=list)
    files: set[str] = field(default_factory=set)

    def resume(self, overwrite: bool) -> None:
        """Take over what an interrupted run of the same recipe has left in the folder.

        Raises an `OutputError` where the run was another one, or its journal is broken, unless it is overwritten.
        """
        path = self.folder / JOURNAL
        if (self.folder / REPORT).exists() or not path.exists():
            return
        try:
            entries = _ENTRIES.validate_python(json.loads(path.read_text()))
        except (ValueError, RecursionError) as error:  # a `ValidationError` is a ValueError
            if overwrite:
                return
            raise OutputError(f"{path} is not as dashq writes it; --overwrite discards the run: {error}") from error
        if entries.recipe == self.recipe:
            self.shards.extend(entries.shards)
            for phase, seconds in entries.seconds.items():
                self.clock.seconds[phase] += seconds
        elif not overwrite:
            raise OutputError(
                f"{self.folder} holds an unfinished run of a different recipe; --overwrite discards it, "
                "and the recipe that it was started with goes on with it"
            )

    def save(self) -> None:
        """Write the journal, all or nothing."""
        shards, files = [asdict(shard) for shard in self.shards], sorted(self.files)
        content = {"recipe": self.recipe, "seconds": self.clock.seconds, "shards": shards, "files": files}
        write_json(self.folder / JOURNAL, content)

    def claim(self, names: Iterable[str]) -> None:
        """Note files before they are written, so that no stop leaves one that nobody knows."""
        self.files.update(names)
        self.save()

    def remove(self) -> None:
        """Let the journal go: the run is finished."""
        (self.folder / JOURNAL).unlink()
