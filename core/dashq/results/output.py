"""One result in the making: a guarded folder, a journal, shards, and the finish that makes them a checkpoint."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jaxtyping import Shaped
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dashq.data import Contents
from dashq.model.location import Location
from dashq.recipe.recipe import Recipe
from dashq.results.card import model_card
from dashq.results.carried import carry
from dashq.results.clock import Clock
from dashq.results.folder import (
    CARD,
    RECIPE,
    check_folder,
    earlier_files,
    put_in_place,
    remove_files,
    remove_unfinished,
    unfinished,
    write_bytes,
    write_json,
    write_text,
)
from dashq.results.journal import Journal
from dashq.results.report import REPORT, LayerReport, Report
from dashq.results.settings import format_settings, stored_layer
from dashq.results.shards import ShardWriter
from dashq.strategies import Container


class Output:
    """The parts of a result in the order of a run: `begin`, `add` for each part of the model, `finish`, `report`.

    Opening it refuses a folder that is not ours or not to be replaced, and resumes an interrupted run of the same
    recipe; only `begin` touches an earlier result, the files of every format that the recipe's registry has among it.
    """

    def __init__(self, recipe: Recipe, clock: Clock, overwrite: bool = False) -> None:
        self.folder = recipe.output
        self._serializer = recipe.serializer
        self._format_files = recipe.format_files
        self._recipe: dict[str, Any] = json.loads(recipe.model_dump_json())
        self._container: Container | None = None  # known when the configuration is
        check_folder(self.folder, overwrite, self._format_files)
        self._journal = Journal(self.folder, self._recipe, clock)
        self._journal.resume(overwrite)
        self._shards = ShardWriter(self._journal)

    def begin(self) -> None:
        """Make way for the run: everything of an earlier one goes, but the shards that this run resumes from."""
        self._journal.claim(earlier_files(self.folder, self._format_files))  # ours, also while they are being removed
        if self._journal.shards:
            remove_unfinished(self.folder, self._journal.files)
            return
        remove_files(self.folder, self._journal.files)
        self._journal.files.clear()
        self._journal.save()

    @property
    def finished_parts(self) -> set[str]:
        """The parts of the model that are on disk, now or from the interrupted run that this one resumes."""
        return self._shards.finished_parts

    @property
    def layers(self) -> list[LayerReport]:
        """The reports of all layers so far."""
        return self._shards.layers

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weights' files."""
        names = [self._container.file] if self._container else self._shards.final_names
        return sum((self.folder / name).stat().st_size for name in names)

    def add(self, part: str, tensors: Mapping[str, Shaped[Tensor, "..."]], layers: Iterable[LayerReport] = ()) -> None:
        """Take in one finished part of the model; writes a shard when enough has come together."""
        self._shards.add(part, tensors, layers)

    def read(self, part: str) -> Mapping[str, Tensor]:
        """The tensors of the shard that holds a finished part."""
        return self._shards.read(part)

    def finish(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Location) -> None:
        """Make the folder a checkpoint: tokenizer, recipe, configuration, and the tensors' final names.

        Of `network` only names and the configuration count; `source` is where the original lies, whose other files
        are carried over, its code among them.
        """
        self._shards.flush()
        with TemporaryDirectory() as aside:  # only when all are written their names are known
            folder = Path(aside)
            write_text(folder / RECIPE, yaml.safe_dump(self._recipe, sort_keys=False, allow_unicode=True))
            self._write_settings(network, folder)
            carry(source, tokenizer, folder)
            self._take_in(folder)
        self._container = self._serializer.container(network.config)
        if self._container:
            self._write_container(self._container, source.trust_remote_code)
        else:
            self._shards.name_shards()

    def report(self, report: Report) -> None:
        """Write the model card and `report.json`, the last file: a folder without it is unfinished."""
        self._journal.claim([CARD, REPORT])
        write_text(self.folder / CARD, model_card(self._recipe, report, self._serializer))
        names = self._journal.files.difference(self._shards.first_names)
        files = {name for name in names if (self.folder / name).is_file()} | {REPORT}
        write_json(self.folder / REPORT, replace(report, files=tuple(sorted(files))).to_json())
        if self._container:
            self._shards.remove()
        self._journal.remove()

    def _take_in(self, folder: Path) -> None:
        """Put the files of another folder into this one, each all or nothing."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        self._journal.claim(files)
        for name, path in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / name, path.read_bytes())

    def _write_settings(self, network: PreTrainedModel, folder: Path) -> None:
        """Write `config.json` and what else the format wants beside the tensors."""
        layers = [stored_layer(layer, self._serializer) for layer in self.layers]
        network.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        settings = {"config.json": {}, **format_settings(self._serializer, layers, network)}
        for name, content in settings.items():
            write_json(folder / name, {**config, **content} if name == "config.json" else content)

    def _write_container(self, container: Container, trust_remote_code: bool) -> None:
        """Bring the shards into the format's one file."""
        path = self.folder / container.file
        self._journal.claim([path.name])
        layers = {layer.name: stored_layer(layer, self._serializer) for layer in self.layers}
        tensors = self._shards.handles()
        contents = Contents(folder=self.folder, layers=layers, tensors=tensors, trust_remote_code=trust_remote_code)
        container.write(unfinished(path), contents)
        put_in_place(unfinished(path), path)
