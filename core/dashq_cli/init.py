"""`dashq init`, and the options that `dashq run` has in common with it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dashq_cli.imports import starting

if TYPE_CHECKING:
    from dashq import Target, Wish
    from dashq.programs import Level

BITS, TARGET = 2.0, "dashq"  # where nothing else is said; the first as in `dashq.starting`, whose import takes time
Bits = Annotated[
    float | None,
    typer.Option(
        help="1 to 8, those that the program's formats hold: bits of each code. A fraction such as 2.5: what a weight "
        "may take on average, with scales. Embeddings and head are not counted: they get more, or stay as they are. "
        f"{BITS:g} if not given.",
        show_default=False,
    ),
]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="TARGET",
        help=f"The program that the result is for: {TARGET}, transformers, mlx, vllm, llama.cpp, ollama or a plugin's. "
        f"{TARGET} if not given.",
        show_default=False,
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        help="Text to calibrate on: a file, or a name on the hub. wikitext2 if not given.", show_default=False
    ),
]
# The times are those of a small model (bench/results/levels.jsonl).
Fast = Annotated[
    bool,
    typer.Option(
        "--fast", help="Closed forms on a diagonal curvature: about a third of the time, much coarser at 2 bits."
    ),
]
Best = Annotated[
    bool,
    typer.Option(
        "--best",
        help="Bits where the model needs them, and a tuner that trains: about 8 times the time, nearest to the model.",
    ),
]
Output = Annotated[
    Path | None, typer.Option(help="The folder of the result; out/MODEL-BITSbit if not given.", show_default=False)
]


@starting()
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a .gguf file, or a name on the hub.")],
    bits: Bits = None,
    target: For = None,
    text: Text = None,
    fast: Fast = False,
    best: Best = False,
    output: Output = None,
) -> None:
    """Print a recipe for MODEL, with comments.

    It is the one that `dashq run MODEL` with the same options writes and runs.
    """
    chosen, wish = wished(model, bits, target, text, fast, best, output)
    typer.echo(chosen.recipe(wish), nl=False)


def for_another(
    recipe: Path, settings: list[str], target: str, bits: float | None, fast: bool, best: bool, output: Path | None
) -> tuple[Path, str]:
    """The recipe that solves another one again for a program: its path and its text."""
    from dashq.recipe.purpose import Purpose
    from dashq.recipe.yaml_text import apply_settings, parse
    from dashq.starting import solved_again

    document = apply_settings(parse(recipe, None), settings)
    level = level_of(fast, best or (not fast and bool(document.data.get("tuner"))))
    return solved_again(document, Purpose(name=target, bits=bits, level=level), output)


def level_of(fast: bool, best: bool) -> "Level":
    """The level that the options stand for; a `UsageError` for both."""
    from dashq.errors import UsageError

    if fast and best:
        raise UsageError("--fast and --best cannot be given together")
    return "fast" if fast else "best" if best else "usual"


def wished(
    model: str, bits: float | None, target: str | None, text: str | None, fast: bool, best: bool, output: Path | None
) -> "tuple[Target, Wish]":
    """The target and the wish that the options stand for."""
    from dashq.recipe.recipe import expanded
    from dashq.registry import installed_registry
    from dashq.starting import TEXT, read_target, usual_output, wish_for

    level = level_of(fast, best)
    chosen = read_target(target or TARGET, installed_registry())
    bits = BITS if bits is None else bits
    folder = expanded(output) if output else usual_output(model, bits)
    return chosen, wish_for(model, bits, folder, text or TEXT, level)
