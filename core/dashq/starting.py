"""From a model and a wish to a recipe, and to a result."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dashq.data import Layer
from dashq.errors import OutputError, UsageError
from dashq.model.decoder import Model
from dashq.model.location import locate
from dashq.pipeline import run
from dashq.programs import LEVELS, Level, Target, Wish
from dashq.recipe.recipe import load_recipe
from dashq.registry import Registry, load_registry
from dashq.results.checkpoint import open_network
from dashq.results.report import Report, read_report
from dashq.strict import guess

TEXT = "wikitext2"  # to calibrate on where nobody says another


@dataclass(frozen=True)
class Result:
    """A finished result: the folder at `path`, its report, and the model in it."""

    path: Path

    @property
    def report(self) -> Report:
        """The content of `report.json`."""
        return read_report(self.path)

    def open(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model as one of transformers, computing in `dtype`."""
        return open_network(self.path, dtype)


def quantize(
    model: str,
    bits: float = 2,
    output: str | Path | None = None,
    target: str = "dashq",
    text: str = TEXT,
    level: Level = "usual",
    overwrite: bool = False,
) -> Result:
    """Quantize a model, given as a folder, a .gguf file or a name on the hub, for a program by the name of a target.

    The recipe that this stands for is written beside the output, which is in `out` unless it is given. Raises a
    `DashqError` for whatever the model, the text, the target or the folder does not allow.
    """
    registry = load_registry()
    folder = Path(output) if output is not None else usual_output(model, bits)
    chosen, wish = read_target(target, registry), wish_for(model, bits, folder, text, level)
    recipe = load_recipe(write_recipe(chosen, wish, overwrite), registry)
    return Result(run(recipe, overwrite=overwrite))


def usual_output(model: str, bits: float) -> Path:
    """The folder of a result whose output nobody names: in `out`, by the names of model and bits."""
    name = Path(model.rstrip("/")).name.removesuffix(".gguf")
    return Path("out") / f"{name or 'model'}-{bits:g}bit"


def wish_for(model: str, bits: float, output: Path, text: str, level: Level) -> Wish:
    """A wish with the layers that the model has, of which only headers are read.

    Raises `UsageError` for bits or a level that nobody can have, `CheckpointError` where there is no such model.
    """
    if not 1 <= bits <= 8:
        raise UsageError(f"--bits should be from 1 to 8, not {bits:g}")
    if level not in LEVELS:
        raise UsageError(f"there is no level {level!r}.{guess(level, LEVELS)} Possible: {', '.join(LEVELS)}")
    return Wish(model=model, output=output, bits=float(bits), level=level, text=text, layers=_layers(model))


def read_target(name: str, registry: Registry) -> Target:
    """The target of that name; a `UsageError` with those that are installed where there is none."""
    if name not in registry.targets:
        known = list(registry.targets)
        raise UsageError(f"there is no target {name!r}.{guess(name, known)} Installed: {', '.join(known)}")
    return registry.targets[name]


def write_recipe(target: Target, wish: Wish, overwrite: bool = False) -> Path:
    """Write the recipe of a wish beside its output, and return where; the same one may stand there already.

    Raises `OutputError` where another stands there, unless it may be overwritten.
    """
    path, text = wish.output.with_name(f"{wish.output.name}.yaml"), target.recipe(wish)
    try:
        if path.exists() and not overwrite and path.read_text() != text:
            raise OutputError(
                f"{path} is another recipe than this would be: `dashq run {path}` goes on with it, --overwrite "
                "replaces it, --output names another folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise OutputError(f"cannot write the recipe {path}: {error.strerror}") from error
    return path


def _layers(model: str) -> Sequence[Layer]:
    return list(Model(locate(model), torch.device("cpu"), torch.float32).layers())
