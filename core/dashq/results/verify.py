"""Compare a result on disk with the numbers of its solver, with its settings, and with other programs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dashq.data import Contents
from dashq.errors import CheckpointError, MissingPackageError, UsageError, cause, refusing
from dashq.model.loading import network_of, read_tokenizer
from dashq.model.mappings import read_mapping
from dashq.model.progress_bars import without_progress_bars
from dashq.model.source import WEIGHTS, WEIGHTS_INDEX, read_tensors
from dashq.programs import Opened
from dashq.registry import Registry, installed_registry
from dashq.results.checkpoint import Checkpoint, open_checkpoint, open_network
from dashq.results.files import SEAL, is_file_of, read_sealed
from dashq.results.fingerprint import content_digest, tensor_digest
from dashq.results.report import REPORT, Report, digest, read_report
from dashq.results.settings import format_settings

PROMPT = "The capital of France is"
ROUNDING = 3.0  # two roundings alike in size are independent of each other: their difference is larger than each


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison, of a layer, a tensor, a file, a setting or logits.

    `difference` is relative to the largest number compared.
    """

    kind: Literal["layers", "tensors", "files", "settings", "logits"] = "layers"
    name: str
    against: str
    difference: float
    allowed: float

    @property
    def passed(self) -> bool:
        """True where the difference is as small as it has to be."""
        return self.difference <= self.allowed


@torch.inference_mode()
def verify(
    folder: Path, program: str | None = None, registry: Registry | None = None, trust_remote_code: bool = False
) -> Iterator[Check]:
    """Every layer against the solver's digest, tensors and files against the report's, and settings as written.

    Then, with a program, every layer against its weights, and logits. Formats are those of `registry`, without one
    those of the installed plugins. Code that lies in the folder runs only with `trust_remote_code`. Raises
    `CheckpointError` where files are broken or the program does not open them, `UsageError` where it is unknown,
    `MissingPackageError` where it is not installed.
    """
    registry = registry or installed_registry()
    if (folder / REPORT).exists() and (changes := _changes_of_config(folder)):
        yield from changes  # nothing is built from a configuration that is another model's
        return
    checkpoint = open_checkpoint(folder, registry, trust_remote_code)
    report = checkpoint.report
    digests = {layer.name: layer.digest for layer in report.layers} if report else {}
    for name in checkpoint.layers:
        actual = digest(checkpoint.quantized(name))
        yield Check(name=name, against="solver", difference=_distance(digests.get(name, actual), actual), allowed=0.0)
    if report:
        yield from _compare_tensors(checkpoint, report)
        yield from _compare_files(checkpoint.folder, report)
        yield from _compare_report(checkpoint.folder)
        yield from _compare_settings(checkpoint)
        yield from _compare_container(checkpoint)
    if program is None:
        return
    opened = _open(checkpoint, program, registry)
    if opened.weight:
        for name in checkpoint.layers:
            yield _compare_weight(checkpoint, name, program, opened)
    if opened.logits:
        yield _compare_logits(checkpoint, program, opened, registry)


def _distance(written: Any, actual: Any) -> float:
    return 0.0 if written == actual else float("inf")


def _compare_tensors(checkpoint: Checkpoint, report: Report) -> Iterator[Check]:
    """One comparison for each tensor that was written, or is there, and for each shard that the index misplaces."""
    if not report.tensors:  # that of an earlier version
        return
    for name in sorted(report.tensors.keys() | checkpoint.tensors.keys()):
        actual = tensor_digest(checkpoint.tensors[name][...]) if name in checkpoint.tensors else None
        difference = _distance(report.tensors.get(name), actual)
        yield Check(kind="tensors", name=name, against="report", difference=difference, allowed=0.0)
    index = checkpoint.folder / WEIGHTS_INDEX
    if index.is_file() and not (checkpoint.folder / WEIGHTS).is_file():
        places = _read_settings(index)["weight_map"]
        names = {file: read_tensors(checkpoint.folder / file) for file in set(places.values())}
        yield from (
            _failure(f"{WEIGHTS_INDEX} {name}", "report") for name, file in places.items() if name not in names[file]
        )


def _compare_files(folder: Path, report: Report) -> Iterator[Check]:
    """One comparison for each file that was carried over; those of an earlier version have no digests."""
    for name, written in report.file_digests.items():
        path = folder / name
        actual = content_digest(path) if is_file_of(folder, path) and path.is_file() else None
        yield Check(kind="files", name=name, against="report", difference=_distance(written, actual), allowed=0.0)


def _changes_of_config(folder: Path) -> list[Check]:
    """A failed comparison for each setting of the model in `config.json` that is not what the run wrote there."""
    places = _changed(read_report(folder).config, _read_settings(folder / "config.json"))
    return [_failure(f"config.json{place}", "report") for place in places]


def _compare_report(folder: Path) -> Iterator[Check]:
    """A failed comparison where the report is not as the run wrote it; those of earlier versions cannot tell."""
    if SEAL in _read_settings(folder / REPORT):
        try:
            read_sealed(folder / REPORT)
        except ValueError:
            yield _failure(REPORT, "run")


def _compare_settings(checkpoint: Checkpoint) -> Iterator[Check]:
    """One comparison for each file, or one for each of its settings that is not what was written there."""
    with torch.device("meta"):
        network = network_of(checkpoint.config(), checkpoint.location)
    layers = list(checkpoint.layers.values())
    for file, content in format_settings(checkpoint.serializer, layers, network).items():
        written = json.loads(json.dumps(content))
        changed = list(_changed(written, _read_settings(checkpoint.folder / file)))
        yield from (_failure(f"{file}{place}", "format") for place in changed)
        if not changed:
            yield Check(kind="settings", name=file, against="format", difference=0.0, allowed=0.0)


def _read_settings(path: Path) -> dict[str, Any]:
    with refusing(f"{path} cannot be read"):
        content: dict[str, Any] = read_mapping(path)
    return content


def _failure(name: str, against: str) -> Check:
    return Check(kind="settings", name=name, against=against, difference=float("inf"), allowed=0.0)


def _compare_container(checkpoint: Checkpoint) -> Iterator[Check]:
    """One comparison for each setting inside the one file that a format has in the place of shards."""
    if container := checkpoint.container:
        trusted = checkpoint.location.trust_remote_code
        contents = Contents(folder=checkpoint.folder, layers=checkpoint.layers, trust_remote_code=trusted)
        settings = container.settings(checkpoint.folder / container.file, contents)
        for name, (expected, actual) in settings.items():
            difference, name = _distance(expected, actual), f"{container.file} {name}"
            yield Check(kind="settings", name=name, against="format", difference=difference, allowed=0.0)


def _changed(written: Any, actual: Any) -> Iterator[str]:
    """The places where a setting that was written is missing or another; added ones do not count."""
    if isinstance(written, dict) and isinstance(actual, dict):
        for key, value in written.items():
            for deeper in _changed(value, actual[key]) if key in actual else [""]:
                yield f" {key}{deeper}"
    elif written != actual:
        yield ""


def _open(checkpoint: Checkpoint, program: str, registry: Registry) -> Opened:
    programs = registry.programs.get(checkpoint.serializer.name, {})
    if program not in programs:
        known = ", ".join(programs) or "none but dashq itself"
        raise UsageError(f"format {checkpoint.serializer.name!r} knows no program {program!r}. Programs: {known}")
    try:
        with without_progress_bars():
            return programs[program].open(checkpoint.folder, checkpoint.location.trust_remote_code)
    except ImportError as error:
        raise MissingPackageError(f"{program} is not installed here: {error}") from error
    except Exception as error:  # from a program that is not ours
        raise CheckpointError(f"{program} does not open {checkpoint.folder}: {cause(error)}") from error


@torch.inference_mode()  # repeated here: under a type checker's hook a generator's decorator has no effect
def _compare_logits(checkpoint: Checkpoint, program: str, opened: Opened, registry: Registry) -> Check:
    assert opened.logits
    ids = read_tokenizer(checkpoint.location)(PROMPT)["input_ids"]
    prompt = torch.tensor([ids])
    trusted = checkpoint.location.trust_remote_code
    network = open_network(checkpoint.folder, torch.float32, registry, trusted, "exact")
    if opened.unpacks_to != torch.float32:  # a close choice between experts may hang on that rounding
        network = network.dequantize(opened.unpacks_to).float()
    ours = network(prompt).logits[0]
    allowed = opened.logits_tolerance
    if opened.computes_in != torch.float32:
        other = open_network(checkpoint.folder, opened.computes_in, registry, trusted, "exact")
        allowed += ROUNDING * _difference(other(prompt).logits[0].float(), ours)
    if opened.rounded:
        for name, stored in checkpoint.layers.items():
            if stored.layer.role == "tied":
                _round_inputs(network.get_output_embeddings(), partial(opened.rounded, name))
            elif not stored.layer.is_looked_up:
                _round_inputs(_multiplying(network, name), partial(opened.rounded, name))
        allowed += ROUNDING * _difference(network(prompt).logits[0], ours)
    return Check(
        kind="logits", name="logits", against=program, difference=_difference(opened.logits(ids), ours), allowed=allowed
    )


def _multiplying(network: PreTrainedModel, name: str) -> nn.Module | None:
    """The module to round the inputs of for a layer: its own, or the experts for the first layer of the first of them.

    None for other layers of experts.
    """
    owner, _, number = name.rpartition(".")
    if number.isdecimal():
        if number != "0" or owner.endswith("down_proj"):
            return None
        name = owner.rpartition(".")[0]
    return network.get_submodule(name)


def _round_inputs(
    module: nn.Module | None,
    rounded: Callable[[Float[Tensor, "*tokens columns"]], Float[Tensor, "*tokens columns"]],
) -> None:
    """Let a module compute with rounded inputs."""
    if module is not None:
        module.register_forward_pre_hook(lambda module, inputs: (rounded(inputs[0]), *inputs[1:]))


def _difference(theirs: Float[Tensor, "tokens vocabulary"], ours: Float[Tensor, "tokens vocabulary"]) -> float:
    return float((theirs - ours).abs().max() / ours.abs().max())


def _compare_weight(checkpoint: Checkpoint, name: str, program: str, opened: Opened) -> Check:
    assert opened.weight
    theirs, ours = opened.weight(name), checkpoint.quantized(name).dequantize()
    if theirs.shape != ours.shape:
        difference = float("inf")
    else:
        ours = ours.to(theirs.dtype).float()
        difference = float((theirs.float() - ours).abs().max() / ours.abs().max().clamp_min(1e-30))
    return Check(name=name, against=program, difference=difference, allowed=opened.tolerance)
