"""One result in the making: a guarded folder, a journal, shards, and the finish that makes them a checkpoint."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from jaxtyping import Shaped
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dashq.data import Contents
from dashq.recipe.recipe import Recipe
from dashq.results.card import model_card
from dashq.results.carried import carry
from dashq.results.clock import Clock
from dashq.results.folder import CARD, RECIPE, check_folder, remove_result, write_json
from dashq.results.journal import Journal
from dashq.results.report import REPORT, LayerReport, Report
from dashq.results.settings import format_settings, stored_layer
from dashq.results.shards import ShardWriter
from dashq.strategies import Container


class Output:
    """The parts of a result in the order of a run: `begin`, `add` for each part of the model, `finish`, `report`.

    Opening it refuses a folder that is not ours or not to be replaced, and resumes an interrupted run of the same
    recipe; only `begin` touches what is there, the files of every format that the recipe's registry has among it.
    """

    def __init__(self, recipe: Recipe, clock: Clock, overwrite: bool = False) -> None:
        self.folder = recipe.output
        self._serializer = recipe.serializer
        self._format_files = {
            file for cls in (type(recipe.serializer), *recipe.registry.serializers.values()) for file in cls.files
        }
        self._recipe: dict[str, Any] = json.loads(recipe.model_dump_json())
        self._container: Container | None = None  # known when the configuration is
        check_folder(self.folder, overwrite)
        self._journal = Journal(self.folder, self._recipe, clock)
        self._journal.resume(overwrite)
        self._shards = ShardWriter(self._journal)

    def begin(self) -> None:
        """Make way for the run: everything of an earlier one goes, but the shards that this run resumes from."""
        self._journal.save()  # the folder is ours, also while it is being emptied
        if not self._journal.shards:
            remove_result(self.folder, self._format_files)

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
        pattern = self._container.file if self._container else "*.safetensors"
        return sum(path.stat().st_size for path in self.folder.glob(pattern))

    def add(self, part: str, tensors: Mapping[str, Shaped[Tensor, "..."]], layers: Iterable[LayerReport] = ()) -> None:
        """Take in one finished part of the model; writes a shard when enough has come together."""
        self._shards.add(part, tensors, layers)

    def read(self, part: str) -> Mapping[str, Tensor]:
        """The tensors of the shard that holds a finished part."""
        return self._shards.read(part)

    def finish(self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Path) -> None:
        """Make the folder a checkpoint: tokenizer, recipe, configuration, and the tensors' final names.

        Of `network` only names and the configuration count; `source` is the original's folder, whose other files
        are carried over.
        """
        self._shards.flush()
        tokenizer.save_pretrained(self.folder)
        carry(source, self.folder)
        (self.folder / RECIPE).write_text(yaml.safe_dump(self._recipe, sort_keys=False, allow_unicode=True))
        self._write_settings(network)
        self._container = self._serializer.container(network.config)
        if self._container:
            self._write_container(self._container)
        else:
            self._shards.name_shards()

    def report(self, report: Report) -> None:
        """Write the model card and `report.json`, the last file: a folder without it is unfinished."""
        (self.folder / CARD).write_text(model_card(self._recipe, report.totals, self._serializer))
        write_json(self.folder / REPORT, report.to_json())
        if self._container:
            self._shards.remove()
        self._journal.remove()

    def _write_settings(self, network: PreTrainedModel) -> None:
        """Write `config.json` and what else the format wants beside the tensors."""
        layers = [stored_layer(layer, self._serializer) for layer in self.layers]
        network.config.save_pretrained(self.folder)
        config = json.loads((self.folder / "config.json").read_text())
        settings = {"config.json": {}, **format_settings(self._serializer, layers, network)}
        for name, content in settings.items():
            write_json(self.folder / name, {**config, **content} if name == "config.json" else content)

    def _write_container(self, container: Container) -> None:
        """Bring the shards into the format's one file."""
        temporary = self.folder / f"{container.file}.unfinished"
        layers = {layer.name: stored_layer(layer, self._serializer) for layer in self.layers}
        container.write(temporary, Contents(folder=self.folder, layers=layers, tensors=self._shards.handles()))
        os.replace(temporary, self.folder / container.file)
