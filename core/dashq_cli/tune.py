"""`dashq tune`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dashq_cli import INTERRUPTED
from dashq_cli.formats import Push, Result, Trust, check_push, push
from dashq_cli.imports import starting
from dashq_cli.processes import Processes, among


def tune(
    folder: Result,
    tuner: Annotated[
        str | None,
        typer.Option(
            help="A tuner's name, or `{name: NAME, PARAMETER: VALUE}`; without one the recipe's, or the only one."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The original model, where it is no longer where the recipe has it.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="A new folder; without one OUT is replaced.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the output.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="The type to compute in; device and type are the recipe's if not given."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Print one JSON object for each event instead of a progress bar.")
    ] = False,
    push_to_hub: Push = None,
    trust_remote_code: Trust = False,
    processes: Processes = 1,
) -> None:
    """Let a result learn from its original model: scales, offsets and norms.

    Codes stay. OUT is replaced when the new result is whole; the same command
    goes on with a tuning that was interrupted, with any number of processes.
    With --processes, or with torchrun, text and checks are shared, and with
    the tuner's `batch` above 1 the samples of its steps.
    """
    with among(processes) as is_first:
        with starting():
            from dashq.recipe.recipe import expanded, read_tuner
            from dashq.registry import load_registry
            from dashq.tune import recipe_to_tune, tune_result
            from dashq_cli.line_log import log_for
            from dashq_cli.progress import print_summary

        check_push(push_to_hub)
        registry = load_registry()
        chosen = read_tuner(tuner, registry) if tuner is not None else None
        recipe = recipe_to_tune(folder, chosen, registry, trust_remote_code)
        changes = {"model": model, "output": output and expanded(output), "device": device, "dtype": dtype}
        changed = {key: value for key, value in changes.items() if value is not None}
        recipe = recipe.model_copy(update=changed)
        try:
            with log_for(quiet or not is_first, log_json and is_first, "reading blocks of the original") as log:
                result = tune_result(folder, recipe, log.hear, overwrite or output is None)
        except KeyboardInterrupt:
            if is_first:
                typer.echo("dashq: interrupted; the same command goes on after the last saved step", err=True)
            raise typer.Exit(INTERRUPTED) from None
        if is_first and not (quiet or log_json):
            print_summary(Console(), result)
        if is_first:
            push(result, push_to_hub)
