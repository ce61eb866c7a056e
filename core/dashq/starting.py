"""From a model and a wish to a recipe, and to a result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dashq.errors import OutputError, UsageError
from dashq.model.capacity import usual_length
from dashq.model.decoder import Model
from dashq.model.location import locate
from dashq.pipeline import check_start, open_model, plan_model, run
from dashq.programs import LEVELS, Level, Target, Wish
from dashq.recipe.recipe import Recipe, expanded, load_recipe
from dashq.registry import Registry, load_registry
from dashq.results.checkpoint import open_network
from dashq.results.report import Report, read_report
from dashq.strict import guess

TEXT = "wikitext2"  # to calibrate on where nobody says another
SEQUENCE_LENGTH = 512  # of its samples, where the model has so many positions


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
    model: str | Path,
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
    folder = usual_output(str(model), bits) if output is None else expanded(Path(output))
    chosen = read_target(target, registry)
    recipe = begin(chosen, wish_for(str(model), bits, folder, text, level), registry, overwrite)
    return Result(run(recipe, overwrite=overwrite))


def usual_output(model: str, bits: float) -> Path:
    """The folder of a result whose output nobody names: in `out`, by the names of model and bits."""
    name = Path(model.rstrip("/")).name.removesuffix(".gguf")
    return Path("out") / f"{name or 'model'}-{bits:g}bit"


def wish_for(model: str, bits: float, output: Path, text: str, level: Level) -> Wish:
    """A wish with the layers that the model has, of which only headers are read.

    Raises `UsageError` for bits, a level or an output that nobody can have, `CheckpointError` where there is no such
    model.
    """
    if not 1 <= bits <= 8:
        raise UsageError(f"--bits should be from 1 to 8, not {bits:g}")
    if level not in LEVELS:
        raise UsageError(f"there is no level {level!r}.{guess(level, LEVELS)} Possible: {', '.join(LEVELS)}")
    if output.name in ("", ".."):
        raise UsageError(f"--output should be a folder by a name, with a recipe of that name beside it, not {output}")
    opened = Model(locate(model), torch.device("cpu"), torch.float32)
    return Wish(
        model=model,
        output=output,
        bits=float(bits),
        level=level,
        text=text,
        sequence_length=usual_length(SEQUENCE_LENGTH, [opened.network.config]),
        layers=opened.layers(),
    )


def read_target(name: str, registry: Registry) -> Target:
    """The target of that name; a `UsageError` with those that are installed where there is none."""
    if name not in registry.targets:
        known = list(registry.targets)
        raise UsageError(f"there is no target {name!r}.{guess(name, known)} Installed: {', '.join(known)}")
    return registry.targets[name]


def recipe_of(target: Target, wish: Wish, registry: Registry) -> Recipe:
    """The recipe of a wish, of which nothing is written; errors name the file that it would be."""
    return load_recipe(_recipe_file(wish), registry, text=target.recipe(wish))


def begin(target: Target, wish: Wish, registry: Registry, overwrite: bool = False) -> Recipe:
    """Write the recipe of a wish beside its output, once it is known that it can be run; the same may stand there.

    Raises `OutputError` where another recipe stands there, unless it may be overwritten, and what `dashq plan` would.
    """
    path, text = _recipe_file(wish), target.recipe(wish)
    if not overwrite and _read(path) not in (None, text):
        raise OutputError(
            f"{path} is another recipe than this would be: `dashq run {path}` goes on with it, --overwrite "
            "replaces it, --output names another folder"
        )
    recipe = load_recipe(path, registry, text=text)
    model = open_model(recipe)
    plan_model(recipe, model)
    check_start(recipe, model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise OutputError(f"cannot write the recipe {path}: {error.strerror}") from error
    return recipe


def _recipe_file(wish: Wish) -> Path:
    return wish.output.with_name(f"{wish.output.name}.yaml")


def _read(path: Path) -> str | None:
    """The text of a file; None where there is none, an `OutputError` where it cannot be read."""
    try:
        return path.read_text() if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read what stands in place of the recipe {path}: {error}") from error
