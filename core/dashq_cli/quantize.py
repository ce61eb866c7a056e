"""`dashq run` and `dashq plan`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dashq_cli.formats import Push, check_push, push
from dashq_cli.imports import starting
from dashq_cli.init import Best, Bits, Fast, For, Output, Text, wished

if TYPE_CHECKING:
    from dashq import Recipe
    from dashq.model.decoder import Model
    from dashq.strategies import Strategy

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


def run(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe, whose name ends in .yaml, or a model: a folder, a .gguf file, or a name on the hub.",
            show_default=False,
        ),
    ],
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
) -> None:
    """Quantize a model, as RECIPE says or as the options wish.

    The recipe that the options stand for is written beside the output. The
    same command goes on with a run that was interrupted.
    """
    with starting():
        import dashq
        from dashq.errors import UsageError
        from dashq_cli.line_log import log_for
        from dashq_cli.progress import print_summary

        registry, command = dashq.load_registry(), ""
        check_push(push_to_hub)
        if Path(recipe).suffix in (".yaml", ".yml"):
            if any(value is not None for value in (bits, target, text, fast or None, best or None, output)):
                raise UsageError(
                    "--bits, --for, --text, --fast, --best and --output are for a model; what a recipe says is "
                    "replaced by --set, as in --set scheme.bits=3"
                )
            resolved = dashq.load_recipe(Path(recipe), registry, settings)
        elif settings:
            raise UsageError(
                f"--set is for a recipe: `dashq init {shlex.quote(recipe)} > my.yaml` writes one for this model"
            )
        else:
            from dashq.starting import begin

            chosen, wish = wished(recipe, bits, target, text, fast, best, output)
            resolved = begin(chosen, wish, registry, overwrite)
            command = chosen.command.format(output=shlex.quote(str(wish.output)))
        from dashq.pipeline import run as quantize  # only now: a mistake in a recipe is found in less time
    try:
        with log_for(quiet, log_json) as log:
            folder = quantize(resolved, log.hear, overwrite)
    except KeyboardInterrupt:
        typer.echo("dashq: interrupted; the same command goes on after the last block on disk", err=True)
        raise typer.Exit(130) from None
    if not (quiet or log_json):
        print_summary(Console(), folder)
        if command:
            typer.echo(f"use it with: {command}")
    push(folder, push_to_hub)


@starting()
def plan(recipe: RecipePath, settings: Settings = []) -> None:  # noqa: B006
    """Show the plan of every layer, without reading a weight.

    Exits with 2 and every reason where the recipe does not fit the model, or
    where a run would stop at its text or its folder. The hub is asked for no
    text.
    """
    import dashq

    resolved = dashq.load_recipe(recipe, dashq.load_registry(), settings)

    # Only now, since a mistake in a recipe is found in less time than these take.
    from dashq.device import in_words
    from dashq.estimate import estimate
    from dashq.pipeline import check_start, open_model, plan_model
    from dashq.recipe.plan import destroying_grids, differing_neighbours
    from dashq_cli.plan_table import plan_table
    from dashq_cli.progress import duration, print_warnings

    model, console = open_model(resolved), Console()
    resolved, notes = _settled(resolved, model)
    plans = plan_model(resolved, model)
    check_start(resolved, model)
    console.print(plan_table(plans, console.width))
    for note in notes:  # behind the table, which can be longer than a terminal keeps
        console.print(note, highlight=False)
    for rule, scheme in {plan.rule: plan.scheme for plan in plans}.items():
        parts = map(_describe, (scheme.estimator, scheme.grouper, scheme.solver))
        console.print(f"[bold]{escape(rule)}[/]: {escape(', '.join(parts))}", highlight=False)
    print_warnings(console, (*model.warnings, *destroying_grids(plans)))
    if resolved.serializer.runtimes_fuse_layers:
        print_warnings(console, differing_neighbours(plans))
    weights = sum(plan.layer.weights for plan in plans)
    total = sum(plan.bytes for plan in plans)
    costs = estimate(model, plans, resolved)
    computed = in_words(model.device, model.dtype)
    console.print(f"{len(plans)} layers in {len(model.blocks)} blocks, {weights:,} weights")
    console.print(f"[bold]{8 * total / weights:.3f}[/] bits per weight with scales and offsets, {_size(total)}")
    console.print(f"not quantized (embeddings, norms, head, skipped layers): {_size(costs.other_bytes)}")
    if resolved.tuner and costs.tuning:
        console.print(
            f"[bold]tuner[/]: {escape(_describe(resolved.tuner))}, {resolved.tuner.steps:,} steps on "
            f"{costs.tuning.tokens:,} tokens: memory about {_size(costs.tuning.memory)}, of the time about "
            f"{duration(costs.tuning.seconds)}",
            highlight=False,
        )
    console.print(f"peak memory about {_size(costs.memory)}, time about {duration(costs.seconds)} {computed}")


def _settled(recipe: "Recipe", model: "Model") -> "tuple[Recipe, list[str]]":
    """The recipe with the choices of an earlier measurement, and notes; where there was none, as it is."""
    from dashq.measuring.choosing import choices_for, settle
    from dashq.measuring.sensitivity import Analysis
    from dashq.results.fingerprint import inputs_of
    from dashq.results.folder import ANALYSIS
    from dashq_cli.progress import counted

    if not recipe.measures:
        return recipe, []
    earlier = Analysis.load(recipe.output)
    misfits = earlier.misfits(recipe, choices_for(recipe, model), inputs_of(model, recipe)) if earlier else []
    if earlier is None or misfits:
        stale = f" (that in {ANALYSIS} is of something else: {'; '.join(misfits)})" if misfits else ""
        return recipe, [
            f"[yellow]note[/] critical layers and a budget wait for a measurement{escape(stale)}: `dashq run` measures "
            "first, `dashq analyze` measures now. Until then this is the plan without them"
        ]
    recipe, selections = settle(recipe, model, earlier)
    sentences = [f"{selection.what}: {counted(selection.layers)}" for selection in selections]
    return recipe, [f"[bold]chosen[/] {escape(sentence)}" for sentence in sentences]


def _describe(strategy: "Strategy") -> str:
    """A strategy with its parameters, as `NAME(size=64, uneven=error)`."""
    fields = ", ".join(f"{key}={value}" for key, value in strategy if value is not None)
    return f"{strategy.name}({fields})" if fields else strategy.name


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
