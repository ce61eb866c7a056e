"""The output folder: shards written as the walk goes, a journal to resume from, and the finishing touch."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol, runtime_checkable

import yaml
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dashq.data import StoredLayer, size_of
from dashq.errors import OutputError
from dashq.model.location import Location
from dashq.model.mixtures import linear_modules
from dashq.programs import Contents
from dashq.recipe.recipe import Recipe
from dashq.results.card import CARD, model_card
from dashq.results.report import Clock, LayerReport
from dashq.runtime.quantizer import FORMAT_VERSION, QUANT_METHOD
from dashq.strategies import Serializer

REPORTS = TypeAdapter(LayerReport)
JOURNAL = "dashq_journal.json"
RECIPE = "recipe.yaml"
REPORT = "report.json"
ANALYSIS = "analysis.json"  # what was measured before the run; kept by whatever follows
INDEX = "model.safetensors.index.json"
# Tensors wait in memory until this many bytes make a shard; a resumed run starts at the last shard's end.
SHARD_BYTES = 256 * 1024**2
# What an earlier result leaves behind, the report first: without it a folder is unfinished.
OUR_FILES = (
    REPORT,
    RECIPE,
    INDEX,
    "config.json",
    "generation_config.json",
    "chat_template*.jinja",
    "tokenizer*",
    "part-*.safetensors",
    "model*.safetensors",
    "model.gguf",
    "*.unfinished",
    "quantize_config.json",
    "dashq_config.json",
    CARD,
    "LICENSE*",
)


@runtime_checkable
class Original(Protocol):
    """What is quantized: its network, whose parameters may be empty, and where it lies."""

    @property
    def network(self) -> PreTrainedModel: ...
    @property
    def location(self) -> Location: ...


class Output:
    """One result in the making. Tensors wait until a shard is full; a shard on disk is never lost again.

    Opening it refuses a folder that is not ours or not to be replaced; only `begin` touches what is there.
    """

    def __init__(self, recipe: Recipe, clock: Clock, overwrite: bool = False) -> None:
        self.folder = recipe.output
        self._serializer, self._clock = recipe.serializer, clock
        self._recipe: dict[str, Any] = json.loads(recipe.model_dump_json())
        self._shards: list[dict[str, Any]] = []
        self._pending: dict[str, Tensor] = {}
        self._pending_parts: list[str] = []
        self._pending_layers: list[LayerReport] = []
        self._one_file: str | None = None  # known when it is written
        check_folder(self.folder, overwrite)
        self._resume(overwrite)

    def begin(self) -> None:
        """Make way for the run: everything of an earlier one goes, but the shards that this run resumes from."""
        self._write_journal()  # the folder is ours, also while it is being emptied
        if not self._shards:
            for pattern in OUR_FILES:
                for path in self.folder.glob(pattern):
                    path.unlink()

    @property
    def finished_parts(self) -> set[str]:
        """The parts of the model that an interrupted run of the same recipe has left on disk."""
        return {part for shard in self._shards for part in shard["parts"]}

    @property
    def layers(self) -> list[LayerReport]:
        """The reports of all layers so far."""
        written = (REPORTS.validate_python(layer) for shard in self._shards for layer in shard["layers"])
        return [*written, *self._pending_layers]

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weights' files."""
        return sum(path.stat().st_size for path in self.folder.glob(self._one_file or "*.safetensors"))

    def add(self, part: str, tensors: Mapping[str, Tensor], layers: Iterable[LayerReport] = ()) -> None:
        """Take in one finished part of the model; writes a shard when enough has come together."""
        # A copy of its own: a view would keep the whole file that it was read from in memory.
        self._pending |= {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        self._pending_parts.append(part)
        self._pending_layers += layers
        if size_of(self._pending.values()) >= SHARD_BYTES:
            self._write_shard()

    def read(self, part: str) -> Mapping[str, Tensor]:
        """The tensors of the shard that holds a finished part."""
        return load_file(next(self._file(n) for n, shard in enumerate(self._shards, 1) if part in shard["parts"]))

    def finish(self, model: Original, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the folder a checkpoint: tokenizer, licence, recipe, configuration, and the tensors' final names."""
        self._write_shard()
        tokenizer.save_pretrained(self.folder)
        if model.network.generation_config is not None:
            model.network.generation_config.save_pretrained(self.folder)
        for path in model.location.folder.glob("LICENSE*"):
            shutil.copy(path, self.folder)
        (self.folder / RECIPE).write_text(yaml.safe_dump(self._recipe, sort_keys=False, allow_unicode=True))
        self._describe(model.network)
        self._one_file = self._serializer.file(model.network.config)
        if self._one_file:
            self._write_file(self._one_file)
        else:
            self._name_shards()

    def report(self, content: Mapping[str, Any]) -> None:
        """Write the model card and `report.json`, the last file: a folder without it is unfinished."""
        (self.folder / CARD).write_text(model_card(self._recipe, content, self._serializer))
        _write_json(self.folder / REPORT, content)
        if self._one_file:
            for path in self.folder.glob("part-*.safetensors"):
                path.unlink()
        (self.folder / JOURNAL).unlink()

    def _name_shards(self) -> None:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            name = self._final_name(number)
            os.replace(self._file(number), self.folder / name)
            weight_map |= dict.fromkeys(shard["tensors"], name)
        if len(self._shards) > 1:
            total = sum(shard["bytes"] for shard in self._shards)
            _write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _describe(self, network: PreTrainedModel) -> None:
        """Write `config.json` and what else the format wants beside the tensors."""
        layers = [packed(layer, self._serializer) for layer in self.layers]
        network.config.save_pretrained(self.folder)
        config = json.loads((self.folder / "config.json").read_text())
        for name, content in {"config.json": {}, **described(self._serializer, layers, network)}.items():
            _write_json(self.folder / name, {**config, **content} if name == "config.json" else content)

    def _write_file(self, name: str) -> None:
        """Bring the shards into the format's one file."""
        opened = [safe_open(self._file(number), framework="pt") for number in range(1, len(self._shards) + 1)]
        handles = {
            key: file.get_slice(key)
            for file, shard in zip(opened, self._shards, strict=True)
            for key in shard["tensors"]
        }
        temporary = self.folder / f"{name}.unfinished"
        layers = {layer.name: packed(layer, self._serializer) for layer in self.layers}
        self._serializer.write(temporary, Contents(folder=self.folder, layers=layers, tensors=handles))
        os.replace(temporary, self.folder / name)

    def _resume(self, overwrite: bool) -> None:
        if not (self.folder / REPORT).exists() and (self.folder / JOURNAL).exists():
            journal = json.loads((self.folder / JOURNAL).read_text())
            if journal["recipe"] == self._recipe:
                self._shards = journal["shards"]
                for phase, seconds in journal["seconds"].items():
                    self._clock.seconds[phase] += seconds
            elif not overwrite:
                raise OutputError(
                    f"{self.folder} holds an unfinished run of a different recipe; --overwrite discards it, "
                    "and the recipe that it was started with goes on with it"
                )

    def _file(self, number: int) -> Path:
        """Where a shard lies, counted from 1: it gets its final name when all of them are there."""
        part = self.folder / f"part-{number:05}.safetensors"
        return part if part.exists() else self.folder / self._final_name(number)

    def _final_name(self, number: int) -> str:
        count = len(self._shards)
        return f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"

    def _write_shard(self) -> None:
        if not self._pending_parts:
            return
        name = f"part-{len(self._shards) + 1:05}.safetensors"
        temporary = self.folder / f"{name}.unfinished"
        save_file(self._pending, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # safetensors keeps its files to their owner
        os.replace(temporary, self.folder / name)
        self._shards.append(
            {
                "parts": self._pending_parts,
                "tensors": list(self._pending),
                "bytes": size_of(self._pending.values()),
                "layers": [asdict(layer) for layer in self._pending_layers],
            }
        )
        self._pending, self._pending_parts, self._pending_layers = {}, [], []
        self._write_journal()

    def _write_journal(self) -> None:
        _write_json(
            self.folder / JOURNAL, {"recipe": self._recipe, "seconds": self._clock.seconds, "shards": self._shards}
        )


def packed(report: LayerReport, serializer: Serializer) -> StoredLayer:
    """How the layer of a report lies in its checkpoint."""
    grid = serializer.grid(report.bits)
    return StoredLayer(layer=report.layer, grid=grid, size=report.group_size, ordered=report.ordered)


def described(
    serializer: Serializer, layers: Sequence[StoredLayer], network: PreTrainedModel
) -> Mapping[str, Mapping[str, Any]]:
    """What the JSON files beside the tensors say of the quantized layers, by the files' names."""
    quantized = {layer.layer.name for layer in layers}
    others = [name for name, _ in linear_modules(network) if name not in quantized]
    entries = serializer.describe(layers, others, network.config)
    if entries is None:
        entries = {"config.json": {"quantization_config": quantization_config(serializer, layers)}}
    return entries


def quantization_config(serializer: Serializer, layers: Iterable[StoredLayer]) -> dict[str, Any]:
    """What `config.json` says of the quantized layers, enough to build them before any tensor is read."""
    entries = {
        packed.layer.name: {"bits": packed.grid.bits, "size": packed.size}
        | ({"ordered": True} if packed.ordered else {})
        for packed in layers
    }
    return {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "serializer": serializer.model_dump(mode="json"),
        "layers": entries,
    }


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is not new, empty or ours, that must not be replaced, or that cannot be written to."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the output {folder.absolute()} is a file, not a folder")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if names and not any(name.startswith((JOURNAL, REPORT, ANALYSIS)) for name in names):
        raise OutputError(f"the output folder {folder.absolute()} exists and is not the result of an earlier run")
    if REPORT in names and not overwrite:
        raise OutputError(f"{folder} already holds a finished result; --overwrite replaces it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"cannot write to the output folder {folder.absolute()}: {error.strerror}") from error


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> Path:
    """Write a file, all or nothing; returns it."""
    temporary = path.with_name(f"{path.name}.unfinished")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path
