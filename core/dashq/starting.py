"""From a recipe's file, or a model and a wish, to a recipe and to a result."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dashq.errors import OutputError, RecipeError, UsageError
from dashq.programs import LEVELS, Level, Target, Wish
from dashq.recipe.purpose import FOR, Purpose, completed, for_another, purpose_of
from dashq.recipe.recipe import Recipe, expanded, validated
from dashq.recipe.yaml_text import Document, apply_settings, parse
from dashq.registry import Registry, installed_registry, load_registry
from dashq.results.report import Report, read_report
from dashq.strict import guess

# What opens models is imported where that is done: a mistake in a recipe is found in less time than it takes.

TEXT = "wikitext2"  # to calibrate on where nobody says another
BITS = 2.0
CHAT = "dashq chat {output}"  # opens results of any format
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
        from dashq.results.checkpoint import open_network

        return open_network(self.path, dtype)


def load_recipe(path: Path, registry: Registry, settings: Sequence[str] = (), text: str | None = None) -> Recipe:
    """Read a recipe, with `settings` such as `scheme.bits=3` in place of what the file says, or a `text` in its place.

    Its strategies are those of `registry`, which goes with the recipe from here on. Where it names a program with
    `for`, what it does not say itself is what that target chooses for the model, whose headers are read. Raises
    `RecipeError`, one line for each mistake, naming file and line, and what a wish for such a model does.
    """
    document = apply_settings(parse(path, text), settings)
    purpose = purpose_of(document)
    if purpose is None:
        return validated(document, registry)
    try:
        target = read_target(purpose.name, registry)
        wish = wish_for(
            document.data["model"],
            BITS if purpose.bits is None else purpose.bits,
            expanded(Path(document.data["output"])),
            TEXT,
            purpose.level,
            document.data.get("trust_remote_code") is True,
        )
        wanted = parse(path, target.recipe(wish)).data
    except UsageError as error:
        raise RecipeError(f"{document.where((FOR,))}: {FOR}: {error}") from error
    whole, chosen, kept = completed(document, wanted)
    return validated(whole, registry).with_target(purpose.name, chosen, kept)


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
    from dashq.pipeline import run

    return Result(run(recipe, overwrite=overwrite))


def usual_output(model: str, bits: float) -> Path:
    """The folder of a result whose output nobody names: in `out`, by the names of model and bits."""
    name = Path(model.rstrip("/")).name.removesuffix(".gguf")
    return Path("out") / f"{name or 'model'}-{bits:g}bit"


def wish_for(model: str, bits: float, output: Path, text: str, level: Level, trust_remote_code: bool = False) -> Wish:
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
    from dashq.model.capacity import usual_length
    from dashq.model.decoder import Model
    from dashq.model.loading import is_language_model
    from dashq.model.location import locate

    formats = installed_registry().serializers.values()
    # A model that is opened as a whole has the same layers in it.
    towers = {kind: place for form in formats for kind, place in form.text_alone.items() if not is_language_model(kind)}
    opened = Model(locate(model, trust_remote_code), torch.device("cpu"), torch.float32, towers)
    return Wish(
        model=model,
        output=output,
        bits=float(bits),
        level=level,
        text=text,
        sequence_length=usual_length(SEQUENCE_LENGTH, [opened.network.config]),
        layers=opened.layers(),
        outside=[layer for layer in opened.all_layers() if layer.role != "linear"],
    )


def read_target(name: str, registry: Registry) -> Target:
    """The target of that name; a `UsageError` with those that are installed where there is none."""
    if name not in registry.targets:
        known = list(registry.targets)
        raise UsageError(f"there is no target {name!r}.{guess(name, known)} Installed: {', '.join(known)}")
    return registry.targets[name]


def recipe_of(target: Target, wish: Wish, registry: Registry) -> Recipe:
    """The recipe of a wish, of which nothing is written; errors name the file that it would be."""
    text = target.recipe(wish)
    return _for_target(load_recipe(_recipe_file(wish), registry, text=text), target, wish, text)


def begin(target: Target, wish: Wish, registry: Registry, overwrite: bool = False) -> Recipe:
    """Write the recipe of a wish beside its output, once it is known that it can be run; the same may stand there.

    Raises `OutputError` where another recipe stands there, unless it may be overwritten, and what `dashq plan` would.
    """
    text = target.recipe(wish)
    return _for_target(begin_with(_recipe_file(wish), text, registry, overwrite), target, wish, text)


def _for_target(recipe: Recipe, target: Target, wish: Wish, text: str) -> Recipe:
    """The recipe that a target wrote as `text`, with all of it that is not the wish's own as what the target chose."""
    own = {"model": wish.model, "output": str(wish.output), "calibration": {"dataset": wish.text}}
    path = _recipe_file(wish)
    _, chosen, kept = completed(Document(path, own, {(): str(path)}), parse(path, text).data)
    return recipe.with_target(target.name, chosen, kept)


def starting_command(recipe: Recipe) -> str:
    """The command that starts the recipe's result, with `{output}` in place of its folder.

    It is that of the target that the recipe is for, else of the first one that suits its format. Where there is none,
    or a serializer of the recipe's own choice does not suit, dashq itself opens the result.
    """
    targets = recipe.registry.targets
    named = [targets[recipe.target]] if recipe.target else []
    return next((target.command for target in (*named, *targets.values()) if target.suits(recipe.serializer)), CHAT)


def begin_with(path: Path, text: str, registry: Registry, overwrite: bool = False) -> Recipe:
    """Write the `text` of a recipe to `path`, as `begin` does with that of a wish."""
    if not overwrite and _read(path) not in (None, text):
        raise OutputError(
            f"{path} is another recipe than this would be: `dashq run {path}` goes on with it, --overwrite "
            "replaces it, --output names another folder"
        )
    from dashq.quantizing.opening import check_start, open_model, plan_model

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


def solved_again(document: Document, purpose: Purpose, output: Path | None) -> tuple[Path, str]:
    """The recipe that solves another one again for a program, by the path and the text that it should have.

    It keeps the model and the text of calibration. Without an `output` the result lies beside the other one. Raises
    `RecipeError` where the recipe names no model or no output.
    """
    for key in ("model", "output"):
        if not isinstance(document.data.get(key), str):
            raise RecipeError(f"{document.where((key,))}: {key}: should be a text")
    folder = expanded(output or Path(f"{document.data['output'].rstrip('/')}-{purpose.name}"))
    scheme = document.data.get("scheme")
    if purpose.bits is None and isinstance(scheme, dict) and isinstance(scheme.get("bits"), int):
        purpose = purpose.model_copy(update={"bits": float(scheme["bits"])})
    return folder.with_name(f"{folder.name}.yaml"), for_another(document, purpose, str(folder))


def _recipe_file(wish: Wish) -> Path:
    return wish.output.with_name(f"{wish.output.name}.yaml")


def _read(path: Path) -> str | None:
    """The text of a file; None where there is none, an `OutputError` where it cannot be read."""
    try:
        return path.read_text() if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read what stands in place of the recipe {path}: {error}") from error
