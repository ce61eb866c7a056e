"""One result in the making: a journal, shards, and the finish that makes them a checkpoint."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from jaxtyping import Shaped
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dashq.data import Contents, StoredLayer
from dashq.model.location import CARD, Location
from dashq.recipe.recipe import Recipe
from dashq.results.card import Origin, model_card, origin_of
from dashq.results.carried import carry
from dashq.results.clock import Clock
from dashq.results.comparison import Finished
from dashq.results.files import remove_files, write_bytes, write_json, write_sealed, write_text, writing
from dashq.results.fingerprint import content_digest, tensor_digest
from dashq.results.folder import MEASURING, PAGE, RECIPE, TUNING, earlier_files
from dashq.results.journal import Journal
from dashq.results.page import page
from dashq.results.report import REPORT, LayerReport, Report
from dashq.results.settings import format_settings, stored_layer
from dashq.results.shards import ShardWriter, Tensors
from dashq.strategies import Container

_LAYERS = TypeAdapter(list[LayerReport])

Change = Callable[[Tensors, Iterable[LayerReport]], tuple[Tensors, Iterable[LayerReport]]]


class Output:
    """The parts of a result in the order of a run: `add` for each part of the model, `finish`, `report`.

    Opening it in the `folder` of a workplace resumes an interrupted run of the same recipe with the same `inputs`,
    which are those of `inputs_of`; everything else of earlier runs goes.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, inputs: Mapping[str, str], clock: Clock, overwrite: bool = False
    ) -> None:
        self.folder, self.clock = folder, clock
        self._serializer, self._name, self._serializers = (
            recipe.serializer,
            recipe.output.name,
            recipe.registry.serializers,
        )
        self._recipe: dict[str, Any] = recipe.model_dump(mode="json")
        self._container: Container | None = None  # known when the configuration is
        self._config: dict[str, Any] = {}
        self._file_digests: dict[str, str] = {}
        self._origin = Origin()
        # Where sums are kept is none of the things that a run has to have in common with the one that it goes on with.
        asked = recipe.model_dump(mode="json", exclude={"calibration": {"keep"}})
        self._journal = Journal(folder, asked, inputs, clock)
        self._journal.resume(overwrite)
        self._shards = ShardWriter(self._journal)
        self._shards.resume(earlier_files(folder, recipe.format_files) | {MEASURING}, overwrite, [TUNING])

    @property
    def finished_parts(self) -> set[str]:
        """The parts of the model that are on disk, now or from the interrupted run that this one resumes."""
        return self._shards.finished_parts

    @property
    def layers(self) -> list[LayerReport]:
        """The reports of all layers so far."""
        return _LAYERS.validate_python(self._shards.records)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weights' files."""
        names = [self._container.file] if self._container else self._shards.final_names
        return sum((self.folder / name).stat().st_size for name in names)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on how the run went, for its report."""
        threads = self._journal.threads
        if len(threads) < 2:
            return ()
        return (
            f"the run was interrupted, and computed with {' and '.join(map(str, threads))} threads in turn: its bytes "
            "can differ from those of a run with one number of threads",
        )

    def add(self, part: str, tensors: Mapping[str, Shaped[Tensor, "..."]], layers: Iterable[LayerReport] = ()) -> None:
        """Take in one finished part of the model; writes it when enough has come together, or waited for a minute."""
        self._shards.add(part, tensors, [asdict(layer) for layer in layers])

    def save(self) -> None:
        """Write the parts that wait for a shard to fill: the run may be about to end."""
        self._shards.save()

    def read(self, part: str, prefix: str) -> Mapping[str, Tensor]:
        """The tensors of a finished part whose names begin with a prefix."""
        return self._shards.read(part, prefix)

    def tensors(self) -> Mapping[str, Any]:
        """All tensors by name, on disk, each read when it is indexed with `[...]`."""
        self._shards.flush()
        return self._shards.handles()

    def stored_layers(self) -> Mapping[str, StoredLayer]:
        """The layers so far by name, as their tensors hold them."""
        return {layer.name: stored_layer(layer, self._serializer) for layer in self.layers}

    def tuning(self) -> Path:
        """The file for the state of a tuner; it goes with the journal."""
        self._journal.claim([TUNING])
        return self.folder / TUNING

    def change(self, change: Change) -> None:
        """Let shard after shard hold what `change` makes of its tensors and of the reports of its layers."""

        def of_records(tensors: Tensors, records: Iterable[Mapping[str, Any]]) -> tuple[Tensors, list[dict[str, Any]]]:
            changed, layers = change(tensors, _LAYERS.validate_python(records))
            return changed, [asdict(layer) for layer in layers]

        self._shards.change(of_records)

    def finish(
        self, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Location, file: Path | None = None
    ) -> None:
        """Make the folder a checkpoint: tokenizer, recipe, configuration, and the tensors' final names.

        Of `network` only names and the configuration count; `source` is where the original lies, whose other files
        are carried over, its code among them, and `file` the one that its weights are in, if that is one.
        """
        self._shards.flush()
        self._origin = origin_of(source, network)
        with TemporaryDirectory() as aside:  # only when all are written their names are known
            folder = Path(aside)
            carry(source, tokenizer, folder)
            self._file_digests = {name: content_digest(path) for name, path in _files_of(folder).items()}
            write_text(folder / RECIPE, yaml.safe_dump(self._recipe, sort_keys=False, allow_unicode=True))
            self._write_settings(network, folder)
            self._take_in(folder)
        self._container = self._serializer.container(network.config)
        if self._container:
            self._write_container(self._container, source.trust_remote_code, file)
        else:
            self._shards.name_shards()

    def report(self, report: Report) -> None:
        """Write the model card, the page and `report.json`, the last file: a folder without it is unfinished."""
        self._journal.claim([CARD, PAGE, REPORT])
        write_text(self.folder / CARD, model_card(self._recipe, report, self._serializer, self._origin))
        names = self._journal.files.difference(self._shards.first_names)
        files = {name for name in names - {TUNING} if (self.folder / name).is_file()} | {PAGE, REPORT}
        report = replace(
            report,
            files=tuple(sorted(files)),
            warnings=(*report.warnings, *self.notes),
            tensors=self._digests(),
            file_digests=self._file_digests,
            config=self._config,
        )
        write_text(self.folder / PAGE, page([Finished(self._name, report, self._recipe)], self._serializers))
        write_sealed(self.folder / REPORT, report.to_json())
        if self._container:
            self._shards.remove()
        remove_files(self.folder, [TUNING])
        self._journal.remove()

    def _digests(self) -> Mapping[str, str]:
        """The digests of all tensors as they are read back; those of a format's one file may have other types there."""
        if not self._container:
            return self._shards.digests
        contents = Contents(folder=self.folder, layers=self.stored_layers())
        tensors = self._container.read(self.folder / self._container.file, contents)
        return {name: tensor_digest(handle[...]) for name, handle in tensors.items()}

    def _take_in(self, folder: Path) -> None:
        """Put the files of another folder into this one, each all or nothing."""
        files = _files_of(folder)
        self._journal.claim(files)
        for name, path in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self.folder / name, path.read_bytes())

    def _write_settings(self, network: PreTrainedModel, folder: Path) -> None:
        """Write `config.json` and what else the format wants beside the tensors."""
        network.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        layers = list(self.stored_layers().values())
        settings = {"config.json": {}, **format_settings(self._serializer, layers, network)}
        self._config = {key: value for key, value in config.items() if key not in settings["config.json"]}
        for name, content in settings.items():
            write_json(folder / name, {**config, **content} if name == "config.json" else content)

    def _write_container(self, container: Container, trust_remote_code: bool, source: Path | None) -> None:
        """Bring the shards into the format's one file, and write what the format wants beside it."""
        path = self.folder / container.file
        self._journal.claim([path.name])
        contents = Contents(
            folder=self.folder,
            layers=self.stored_layers(),
            tensors=self._shards.handles(),
            trust_remote_code=trust_remote_code,
            source=source,
        )
        with writing(path) as temporary:
            container.write(temporary, contents)
        texts = container.beside(contents)
        self._journal.claim(texts)
        for name, text in texts.items():
            write_text(self.folder / name, text)


def _files_of(folder: Path) -> dict[str, Path]:
    """All files below a folder, by their names there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}
