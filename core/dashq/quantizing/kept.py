"""The sums that calibration forms, kept on disk by all that they depend on, and read where they would be the same."""

import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dashq.calibration.folds import FoldSums
from dashq.calibration.shares import Shares
from dashq.calibration.sums import PartSums
from dashq.data import size_of
from dashq.errors import OutputError, PlanError, PluginError
from dashq.model.decoder import Model
from dashq.model.mappings import read_mapping
from dashq.processes.group import here
from dashq.processes.trees import outline, rebuilt, tensors_of
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Recipe
from dashq.results.files import UNFINISHED, remove_files, writing
from dashq.results.fingerprint import content_digest, differences, inputs_with, tensor_digest
from dashq.strategies import Strategy

HEAD = "head"  # the part of the sums that are formed behind the blocks
MADE_FROM = "made_from.json"  # the file beside sums that says in words what they depend on
# The names of folders and of files, whole or unfinished, that are removed with them.
FOLDER = re.compile(r"[0-9a-f]{16}")
FILE = re.compile(r"(made_from\.json|.+-[0-9a-f]{16}\.safetensors)(\.[0-9a-f]{16}\.unfinished)?")
# Entries of schemes and overrides that sums do not depend on; and those of which an override has one at least, if they
# depend on it.
FREE, DECIDING = ("bits", "type", "grouper", "solver", "pooling_tokens"), ("estimator", "router", "skip")


@dataclass(frozen=True)
class Kept:
    """The files of one recipe's sums, one for each part of the model with a planned layer: a block, or the head.

    All lie in a `folder` whose name is a digest of the `inputs`: what sums depend on besides a part's own layers and
    their estimators, by which its file is called. A file is put in its place when it is whole, and says itself what it
    was written with; several runs may write the same one at a time. `found` are the parts whose file is there,
    `damaged` those of which it is not as it was written. All are found where sums are `taken`.
    """

    folder: Path
    inputs: Mapping[str, str]
    parts: Mapping[str, Sequence[LayerPlan]]
    files: Mapping[str, str]
    ending: str  # of a file that is being written by this run
    found: frozenset[str] = frozenset()
    damaged: tuple[str, ...] = ()
    taken: bool = False

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        model: Model,
        plans: Sequence[LayerPlan],
        tokens: Int64[Tensor, "samples tokens"],
    ) -> "Kept | None":
        """The sums of these `plans` on all calibration `tokens`, which are not looked for yet.

        None where the recipe has no folder to keep them in, or where they depend on what is quantized.
        """
        if recipe.keep is None or recipe.calibration.propagate != "original":
            return None
        parts = parts_of(plans)
        strategies = [strategy for own in parts.values() for plan in own for strategy in _strategies(plan)]
        shares = Shares.of(plans, recipe.calibration)
        inputs = inputs_with(model, strategies, tokens) | _code(strategies)
        inputs["batches"] = f"of {shares.samples_per_batch} samples in {shares.count} shares"
        inputs["number of threads"] = str(torch.get_num_threads())
        run = f"{socket.gethostname()} {os.path.realpath(recipe.output)}"
        files = {part: f"{part}-{_digest([*map(_dependence, own)])}.safetensors" for part, own in parts.items()}
        return cls(recipe.keep / _digest(inputs), inputs, parts, files, f".{_digest(run)}{UNFINISHED}")

    @property
    def there(self) -> frozenset[str]:
        """The parts whose file is there; nothing is read."""
        return frozenset(part for part in self.parts if self._path(part).is_file())

    @property
    def bytes_there(self) -> int:
        """The bytes of the files that are there."""
        return sum(self._path(part).stat().st_size for part in self.there)

    def others(self) -> str:
        """The differences of these inputs from those of the nearest sums in the same place; empty without any."""
        reasons: list[list[str]] = []
        for path in self.folder.parent.glob(f"*/{MADE_FROM}"):
            with suppress(OSError, ValueError):
                if changes := differences(read_mapping(path), self.inputs):
                    reasons.append(changes)
        nearest: list[str] = min(reasons, key=len, default=[])
        return "; ".join(nearest)

    def looked_for(self) -> "Kept":
        """The same sums with what is on disk; every file is read, and all processes agree on what they do.

        Sums are taken where each process finds those of all parts.
        """
        damaged: list[str] = []
        if here().is_first:
            damaged = [part for part in self.parts if part in self.there and not _is_as_written(self._path(part))]
        damaged = here().of_first(lambda: damaged)
        there = here().of_first(lambda: sorted(self.there))
        found = frozenset(there).difference(damaged)
        is_whole = bool(found) and found == self.parts.keys()
        taken = all(here().of_all(is_whole and self.there >= found))
        return replace(self, found=found, damaged=tuple(damaged), taken=taken)

    @property
    def sentence(self) -> str:
        """The use that a run makes of the folder."""
        if self.taken:
            return f"calibration is not done again: what an earlier run learned is read from {self.folder}"
        return f"what calibration learns is kept in {self.folder}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence where sums that are there cannot be used."""
        if self.damaged:
            which = f"what {self.folder} keeps of {self.damaged[0]} is not as it was written"
        elif self.found and not self.taken:
            which = f"{self.folder} keeps {len(self.found)} of {len(self.parts)} parts"
        else:
            return ()
        return (f"{which}: all blocks are calibrated anew",)

    def add(self, part: str, sums: PartSums) -> None:
        """Write the sums of a part, all or nothing; an `OutputError` names the file where that is not possible."""
        path = self._path(part)
        text = json.dumps(outline(sums))
        # Copies of their own: states may share memory, which no file of safetensors can.
        tensors = [tensor.detach().cpu().contiguous().clone() for tensor in tensors_of(sums)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot keep calibration in {self.folder}: {error.strerror}") from error
        if not (self.folder / MADE_FROM).exists():
            with writing(self.folder / MADE_FROM, self.ending) as temporary:
                temporary.write_text(json.dumps(self.inputs, indent=1))
        try:
            with writing(path, self.ending) as temporary:
                _save(temporary, tensors, text)
                # safetensors keeps its files to their owner; this one is as open as the user wants files to be.
                shutil.copymode(self.folder / MADE_FROM, temporary)
        except BaseException:
            with suppress(OSError):
                path.with_name(f"{path.name}{self.ending}").unlink()
            raise

    def read(self, part: str, device: torch.device) -> PartSums:
        """The sums of a part, on a device; an `OutputError` where they have gone or changed since they were found."""
        path = self._path(part)
        try:
            text, tensors, _ = _load(path)
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{path} has gone or changed while it was needed; the same command goes on, and calibrates anew"
            ) from error
        tree = json.loads(text)
        like, own = self._like(part, tree["fields"]), iter([tensor.to(device) for tensor in tensors])
        sums: PartSums = rebuilt(tree, like, own)
        return sums

    def _like(self, part: str, fields: Mapping[str, Any]) -> PartSums:
        """Sums that are built as those of a file, without a token in them."""
        plans = {plan.layer.name: plan for plan in self.parts[part]}

        def empty(folds: Mapping[str, Any]) -> dict[str, FoldSums]:
            names = folds["fields"]
            return {name: FoldSums(plans[name].scheme.estimator.start(plans[name].layer)) for name in names}

        chosen = {mixture: [0] for mixture in fields["chosen"]["fields"]}
        return PartSums(empty(fields["folds"]), {}, empty(fields["pooled_folds"]), {}, chosen)

    def _path(self, part: str) -> Path:
        return self.folder / self.files[part]


def parts_of(plans: Sequence[LayerPlan]) -> Mapping[str, Sequence[LayerPlan]]:
    """The plans whose layers calibration forms sums of, by the part of the model; embeddings have none."""
    parts: dict[str, list[LayerPlan]] = {}
    for plan in plans:
        if plan.layer.role == "linear":
            parts.setdefault(plan.layer.block, []).append(plan)
        elif not plan.layer.is_looked_up:
            parts.setdefault(HEAD, []).append(plan)
    return parts


def bytes_to_keep(plans: Sequence[LayerPlan]) -> int:
    """The bytes on disk of all sums, at most: layers that turn out to share their inputs share them there too.

    Raises a `PlanError` where the state of an estimator cannot be kept.
    """
    sizes: dict[tuple[str, int], int] = {}
    total = 0
    for plan in (plan for own in parts_of(plans).values() for plan in own):
        estimator = plan.scheme.estimator
        kind = estimator.model_dump_json(), plan.layer.columns
        if kind not in sizes:
            state = estimator.start(plan.layer)
            try:
                outline(state)
            except PluginError as error:
                raise PlanError(
                    f"estimator {estimator.name!r}: {error}. Leave `calibration.keep` out, or use another estimator"
                ) from error
            sizes[kind] = size_of(tensors_of(state))
        total += sizes[kind] * (1 if plan.layer.expert is None else 2)  # an expert's own, and the pooled one
    return total


def dependence(recipe: Recipe) -> str:
    """All of a recipe that sums can depend on: recipes in which it is the same learn the same.

    The model need not be opened; what is left to measurement counts as it stands there.
    """
    settings = recipe.model_dump(mode="json", exclude={"calibration": {"keep"}})
    overrides = [_without_free(override) for override in settings["overrides"]]
    parts = {
        "settings": {key: settings[key] for key in ("model", "device", "dtype", "trust_remote_code", "calibration")},
        "scheme": _without_free(settings["scheme"]),
        "overrides": [override for override in overrides if any(override[key] is not None for key in DECIDING)],
        "outside": [settings[key] and _without_free(settings[key]) for key in ("embeddings", "head")],
    }
    return json.dumps(parts, sort_keys=True)


def remove_kept(folder: Path) -> None:
    """Remove all sums that runs have kept in a folder, and the folder where nothing else lies in it."""
    for own in [path for path in folder.glob("*") if FOLDER.fullmatch(path.name)]:
        remove_files(own, [path.name for path in own.glob("*") if FILE.fullmatch(path.name)])
        with suppress(OSError):
            own.rmdir()
    with suppress(OSError):
        folder.rmdir()


def _without_free(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in FREE}


def _strategies(plan: LayerPlan) -> list[Strategy]:
    """The strategies that have a say in what calibration learns of a layer."""
    router = plan.scheme.router if plan.layer.expert is not None else None
    return [plan.scheme.estimator, *([router] if router else [])]


def _dependence(plan: LayerPlan) -> list[Any]:
    """All of a layer's plan that its sums depend on, and those that it shares with others."""
    return [asdict(plan.layer), *(strategy.model_dump(mode="json") for strategy in _strategies(plan))]


def _code(strategies: Iterable[Strategy]) -> dict[str, str]:
    """Digests of the files that strategies are written in: a plugin may change while its version stays."""
    modules = sorted({type(strategy).__module__ for strategy in strategies})
    paths = {module: Path(getattr(sys.modules.get(module), "__file__", None) or "") for module in modules}
    return {f"code of {module}": content_digest(path) for module, path in paths.items() if path.is_file()}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _seal(text: str, tensors: Sequence[Shaped[Tensor, "..."]]) -> str:
    return _digest([text, *map(tensor_digest, tensors)])


def _save(path: Path, tensors: Sequence[Shaped[Tensor, "..."]], text: str) -> None:
    numbered = {str(number): tensor for number, tensor in enumerate(tensors)}
    content = json.dumps([text, _seal(text, tensors)])  # one entry, since safetensors keeps several in no fixed order
    try:
        save_file(numbered, path, metadata={"sums": content})
    except SafetensorError as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def _load(path: Path) -> tuple[str, list[Tensor], str]:
    """The outline of the sums in a file, their tensors and their seal; an `OSError` or `ValueError` if unreadable."""
    try:
        with safe_open(path, framework="pt") as file:
            # Copies lie as other tensors in memory do, by which a product's last digits can depend.
            tensors = [file.get_tensor(str(number)).clone() for number in range(len(file.keys()))]
            text, seal = json.loads((file.metadata() or {})["sums"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from error
    return text, tensors, seal


def _is_as_written(path: Path) -> bool:
    """True where a file has all that was written into it, and nothing else."""
    try:
        text, tensors, seal = _load(path)
    except (OSError, ValueError):
        return False
    return seal == _seal(text, tensors)
