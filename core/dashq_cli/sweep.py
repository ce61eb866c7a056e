"""`dashq sweep`."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from dashq_cli import INTERRUPTED
from dashq_cli.imports import starting
from dashq_cli.processes import beside
from dashq_cli.quantize import RecipePath, Settings


def sweep(
    recipe: RecipePath,
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=V1,V2",
            help="Values of an entry, as in --vary scheme.bits=2,3; given again, every combination is a member.",
            show_default=False,
        ),
    ],
    settings: Settings = [],  # noqa: B006 - typer wants a list
    output: Annotated[
        Path | None, typer.Option(help="The folder of the sweep; the recipe's output with -sweep, if not given.")
    ] = None,
    member: Annotated[
        int | None, typer.Option(min=1, help="Run this member alone, counted from 1, as a job of an array does.")
    ] = None,
    members: Annotated[bool, typer.Option("--members", help="Print the number of members, and end.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Plan all members, and end.")] = False,
    plot: Annotated[Literal["svg", "png"], typer.Option(help="The kind of the figure.")] = "svg",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run finished members again.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Print one JSON object for each event instead of a progress bar.")
    ] = False,
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, metavar="N", help="Run N members at a time, in processes of their own."),
    ] = 1,
) -> None:
    """Run RECIPE with every combination of some values, and compare them.

    All members are planned before the first is run. Each has its own folder
    and recipe in that of the sweep; the same command goes on with a sweep that
    was interrupted, and several processes share its members. Ends with
    sweep.json, sweep.csv and a figure of quality against bytes.
    """
    with starting():
        import dashq
        from dashq.errors import UsageError
        from dashq.recipe.recipe import expanded
        from dashq.recipe.variations import variations

        varied = variations(vary)
        if members:
            typer.echo(len(varied))
            return
        if member is not None and member > len(varied):
            raise UsageError(f"--member {member}: there are {len(varied)} members")
        if processes > 1 and (overwrite or member is not None):
            raise UsageError("--processes is for a whole sweep, and not for --member or --overwrite")
        registry = dashq.load_registry()
        base = dashq.load_recipe(recipe, registry, settings)
        folder = expanded(output) if output else base.output.with_name(f"{base.output.name}-sweep")

        # Only now, since a mistake in a recipe is found in less time than these take.
        from dashq_cli.members import Members
        from dashq_cli.members_table import plan_of_members, print_comparison, write_comparison
        from dashq_cli.shared_sums import SharedSums

    every = Members.of(recipe, varied, settings, folder, registry)
    own = every if member is None else every.only(member - 1)
    plans = own.plan(overwrite)
    console = Console(quiet=quiet or log_json)
    console.print(plan_of_members(own, plans))
    planned = {part.number: layers for part, layers in zip(own, plans, strict=True)}
    # One job of an array would not know whether others that run their finished members again still need anything.
    shared = SharedSums.of(every, {} if overwrite and member is not None else planned)
    if shared.sentence:
        console.print(shared.sentence, highlight=False, markup=False, soft_wrap=True)
    if plan:
        return
    options = [*(f"--vary={value}" for value in vary), *(f"--set={value}" for value in settings)]
    try:
        with beside(["sweep", str(recipe), *options, f"--output={folder}", "--quiet"], processes):
            failures = own.run(console, quiet, log_json, overwrite, lambda part: shared.recipe_of(part, overwrite))
    except KeyboardInterrupt:
        done = sum(part.is_done for part in own)
        typer.echo(
            f"dashq: interrupted; {done} of {len(own)} members are finished and kept in {folder}: the same command "
            "goes on after them, and after the blocks of the one that was run",
            err=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    shared.give_up(every)
    results = [part for part in every if part.is_done]
    files = write_comparison(folder, results, plot)
    if results:
        print_comparison(console, results)
        console.print(f"the sweep is in {folder}: {', '.join(files)}", highlight=False, markup=False, soft_wrap=True)
    if failures:
        raise typer.Exit(2)
