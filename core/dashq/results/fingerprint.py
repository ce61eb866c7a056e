"""Fingerprints: of what a result is made from, and of every tensor and file in it."""

import hashlib
import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from pydantic import BaseModel
from torch import Tensor

from dashq import hooks
from dashq.device import type_name
from dashq.errors import CheckpointError
from dashq.model.decoder import Model
from dashq.model.location import own_files
from dashq.model.source import weight_files
from dashq.recipe.recipe import Recipe
from dashq.results.report import versions
from dashq.strategies import Strategy

# Of a file the beginning is read, and pieces at even distances: enough to know a file that was written anew.
BEGINNING, PIECES, PIECE = 2**22, 64, 2**14
SETTINGS = (".json", ".jinja", ".model", ".txt", ".py")  # of a model, its tokenizer and its code


def inputs_of(
    model: Model,
    recipe: Recipe,
    tokens: Int64[Tensor, "samples tokens"] | None = None,
    tuner_tokens: Int64[Tensor, "tuner_samples tuner_tokens"] | None = None,
) -> dict[str, str]:
    """All that a run is made from besides its recipe, in words: files, text, versions, the device's kind and the type.

    Where the `tokens` of the calibration text, or those of the tuner's, are not given, nothing is said of that text.
    """
    inputs = inputs_with(model, _strategies(recipe), tokens)
    if tuner_tokens is not None:
        inputs["tuner's text"] = f"{tuner_tokens.numel()} tokens {tensor_digest(tuner_tokens)}"
    return inputs


def inputs_with(
    model: Model, strategies: Iterable[Strategy], tokens: Int64[Tensor, "samples tokens"] | None = None
) -> dict[str, str]:
    """All that these strategies make something from, as `inputs_of` has it for those of a whole recipe."""
    location = model.location
    if location.gguf:
        paths = [location.folder / location.gguf]
    else:
        settings = [path for path in own_files(location.folder, "*") if path.suffix in SETTINGS]
        paths = [*weight_files(location.folder), *settings]
    inputs = file_inputs(paths)
    inputs |= {f"version of {name}": version for name, version in {**versions(), **_plugins(strategies)}.items()}
    inputs |= {"device": model.device.type, "dtype": type_name(model.dtype)}
    if tokens is not None:
        inputs["calibration text"] = f"{tokens.numel()} tokens {tensor_digest(tokens)}"
    return inputs


def file_inputs(paths: Sequence[Path]) -> dict[str, str]:
    """The size and a digest of each file, of its beginning and of pieces of the rest."""
    return {f"file {path.name}": _file_digest(path) for path in paths}


def work_of(recipe: Recipe, inputs: Mapping[str, str]) -> dict[str, str]:
    """All that processes have to have in common, in words: what a result is made from, the recipe and the threads.

    Folders may have other names on other machines: of the model its files count, and one process writes the output.
    """
    settings = recipe.model_dump(mode="json", exclude={"model": True, "output": True, "calibration": {"keep"}})
    entries = {f"recipe's {key}": str(value) for key, value in settings.items()}
    return {**inputs, **entries, "number of threads": str(torch.get_num_threads())}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The differences between two fingerprints, in words."""
    changes = []
    for key in sorted(before.keys() | now.keys()):
        if key not in now:
            changes.append(f"{key} is gone")
        elif key not in before:
            changes.append(f"{key} is new")
        elif before[key] != now[key]:
            is_digest = key.startswith(("file", "code", "calibration", "tuner"))
            changes.append(f"{key} has changed" if is_digest else f"{key} was {before[key]} and is {now[key]}")
    return changes


def tensor_digest(tensor: Shaped[Tensor, "..."]) -> str:
    """A digest of a tensor's type, shape and values."""
    content = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()[:16]


def content_digest(path: Path) -> str:
    """A digest of all bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _file_digest(path: Path) -> str:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            # A safetensors file says in its first bytes how long its header is.
            header = int.from_bytes(start, "little") if path.suffix == ".safetensors" else 0
            content = hashlib.sha256(start + file.read(min(max(header, BEGINNING), size)))
            step = max(1, (size - file.tell()) // PIECES)
            for place in range(file.tell(), size, max(step, PIECE)):
                file.seek(place)
                content.update(file.read(PIECE))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return f"{size} bytes {content.hexdigest()[:16]}"


def _plugins(strategies: Iterable[Strategy]) -> dict[str, str]:
    """The versions of the packages that strategies come from."""
    packages = {type(strategy).__module__.split(".")[0] for strategy in strategies}
    entries = importlib.metadata.entry_points(group=hooks.PROJECT)
    # Each one once: whenever it is asked for its name or version, it reads its metadata.
    providers = {entry.dist for entry in entries if entry.dist and entry.module.split(".")[0] in packages}
    return {provider.name: provider.version for provider in providers}


def _strategies(value: Any) -> Iterator[Strategy]:
    """All strategies inside an entry of a recipe."""
    if isinstance(value, Strategy):
        yield value
    elif isinstance(value, BaseModel):
        for _, entry in value:
            yield from _strategies(entry)
    elif isinstance(value, tuple):
        for entry in value:
            yield from _strategies(entry)
