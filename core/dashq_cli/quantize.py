"""`dashq run`."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dashq_cli import INTERRUPTED
from dashq_cli.formats import Push, check_push, push
from dashq_cli.imports import starting
from dashq_cli.init import Best, Bits, Fast, For, Output, Text, for_another, wished
from dashq_cli.processes import Processes, among

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe in YAML.", show_default=False)]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace an entry of the recipe, as in --set scheme.bits=3; may be given again.",
        show_default=False,
    ),
]


RecipeOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE|MODEL",
        help="A recipe, whose name ends in .yaml, or a model: a folder, a .gguf file, or a name on the hub.",
        show_default=False,
    ),
]


def run(
    recipe: RecipeOrModel,
    settings: Settings = [],  # noqa: B006 - typer wants a list
    bits: Bits = None,
    target: For = None,
    text: Text = None,
    fast: Fast = False,
    best: Best = False,
    output: Output = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Print one JSON object for each event instead of a progress bar.")
    ] = False,
    push_to_hub: Push = None,
    processes: Processes = 1,
) -> None:
    """Quantize a model, as RECIPE says or as the options wish.

    The recipe that the options stand for is written beside the output. With
    --for, a recipe is solved again for that program: its model and text stay.
    The same command goes on with a run that was interrupted, with any number
    of processes. On several machines torchrun starts them: `torchrun --nnodes
    2 --nproc-per-node 4 ... -m dashq run RECIPE`.
    """
    with among(processes) as is_first:
        with starting():
            import dashq
            from dashq_cli.line_log import log_for
            from dashq_cli.progress import print_summary

            registry = dashq.load_registry()
            check_push(push_to_hub)
            options = {"bits": bits, "target": target, "text": text, "fast": fast, "best": best, "output": output}
            if not is_recipe(recipe, settings, options):
                from dashq.starting import begin, recipe_of

                chosen, wish = wished(recipe, bits, target, text, fast, best, output)
                resolved = begin(chosen, wish, registry, overwrite) if is_first else recipe_of(chosen, wish, registry)
            elif target:
                from dashq.starting import begin_with, load_recipe

                path, again = for_another(Path(recipe), settings, target, bits, fast, best, output)
                if is_first:
                    resolved = begin_with(path, again, registry, overwrite)
                else:
                    resolved = load_recipe(path, registry, text=again)
            else:
                resolved = dashq.load_recipe(Path(recipe), registry, settings)
            # Only now: a mistake in a recipe is found in less time than this takes.
            from dashq.pipeline import run as quantize
            from dashq.starting import starting_command
        shows = is_first and not (quiet or log_json)
        if resolved.overruling and shows:
            typer.echo(resolved.overruling)
        try:
            with log_for(quiet or not is_first, log_json and is_first) as log:
                folder = quantize(resolved, log.hear, overwrite)
        except KeyboardInterrupt:
            if is_first:
                typer.echo(f"dashq: interrupted; {_kept(resolved.output)}", err=True)
            raise typer.Exit(INTERRUPTED) from None
        if shows:
            print_summary(Console(), folder)
            command = starting_command(resolved).format(output=shlex.quote(str(resolved.output)))
            typer.echo(f"use it with: {command}")
        if is_first:
            push(folder, push_to_hub)


def _kept(output: Path) -> str:
    """A sentence on what a run that was interrupted has left on disk."""
    from dashq.model.decoder import OUTSIDE
    from dashq.results.folder import JOURNAL, MEASURING
    from dashq.results.journal import parts_on_disk
    from dashq.results.workplace import unfinished

    folder = unfinished(output)
    for record, what in ((JOURNAL, "finished"), (MEASURING, "measured")):
        if blocks := parts_on_disk(folder / record) - {OUTSIDE}:
            number = "1 block is" if len(blocks) == 1 else f"{len(blocks)} blocks are"
            return f"{number} {what} and kept in {folder}: the same command goes on after them"
    return "no block is finished yet: the same command begins anew"


def is_recipe(name: str, settings: list[str], options: Mapping[str, object]) -> bool:
    """True for the name of a recipe, False for that of a model; a `UsageError` for options that are for the other."""
    from dashq.errors import UsageError

    if Path(name).suffix in (".yaml", ".yml"):
        given = {name for name, value in options.items() if value is not None and value is not False}
        if "text" in given or (given and "target" not in given):
            raise UsageError(
                "--text is for a model, and so are --bits, --fast, --best and --output where no --for solves a recipe "
                "again for another program; what a recipe says is replaced by --set, as in --set scheme.bits=3"
            )
        return True
    if settings:
        raise UsageError(f"--set is for a recipe: `dashq init {shlex.quote(name)} > my.yaml` writes one for this model")
    return False
