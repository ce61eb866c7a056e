"""`dashq plan`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from dashq_cli.imports import starting
from dashq_cli.init import Best, Bits, Fast, For, Output, Text, for_another, wished
from dashq_cli.quantize import RecipeOrModel, Settings, is_recipe

if TYPE_CHECKING:
    from dashq import LayerPlan, Recipe
    from dashq.calibration.tokens import Drawn
    from dashq.measuring.analysis import Analysis, Choices
    from dashq.model.decoder import Model
    from dashq.strategies import Strategy

_OUTSIDE = {
    "embeddings": "embeddings",
    "per_layer": "embeddings of each block",
    "head": "head",
    "tied": "embeddings and head, one matrix",
}


@starting()
def plan(
    recipe: RecipeOrModel,
    settings: Settings = [],  # noqa: B006 - typer wants a list
    bits: Bits = None,
    target: For = None,
    text: Text = None,
    fast: Fast = False,
    best: Best = False,
    output: Output = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show every layer in a line of its own.")] = False,
    processes: Annotated[
        int, typer.Option("--processes", min=1, metavar="N", help="Say what each of N processes would take.")
    ] = 1,
) -> None:
    """Show what a run would do, without reading a weight.

    Layers alike share a line. Exits with 2 and every reason where the recipe
    does not fit the model, or where a run would stop at its text or its
    folder. The hub is asked for no text. Ends with the loss that an earlier
    measurement of `dashq analyze` or `dashq run` foretells.
    """
    import dashq

    registry = dashq.load_registry()
    options = {"bits": bits, "target": target, "text": text, "fast": fast, "best": best, "output": output}
    if is_recipe(recipe, settings, options):
        path, again = Path(recipe), None
        if target:
            path, again = for_another(path, settings, target, bits, fast, best, output)
        resolved = dashq.load_recipe(path, registry, [] if again else settings, again)
    else:
        from dashq.starting import recipe_of

        resolved = recipe_of(*wished(recipe, bits, target, text, fast, best, output), registry)

    # Only now, since a mistake in a recipe is found in less time than these take.
    from dashq.quantizing.opening import check_start, open_model, plan_model
    from dashq_cli.plan_table import kind_table, layer_table

    model, console = open_model(resolved), Console()
    settled, notes = _settled(resolved, model)
    plans = plan_model(settled, model)
    calibration = _calibration(settled, model, plans, check_start(settled, model))
    console.print(layer_table(plans, console.width) if layers else kind_table(plans))
    for sentence in filter(None, (resolved.completed, resolved.overruling)):
        console.print(sentence, highlight=False, markup=False)
    for note in notes:  # behind the table, which can be longer than a terminal keeps
        console.print(note, highlight=False)
    _print_schemes(console, settled, plans)
    _print_totals(console, settled, model, plans, calibration)
    if processes > 1:
        _print_processes(console, settled, model, plans, processes)
    console.print(_forecast(resolved, model, plans), highlight=False, markup=False)


def _print_schemes(console: Console, recipe: "Recipe", plans: "Sequence[LayerPlan]") -> None:
    """Print the strategies of each rule, and what is doubtful about them."""
    from dashq.recipe.plan import destroying_grids, differing_neighbours
    from dashq_cli.progress import print_warnings

    for rule, scheme in {plan.rule: plan.scheme for plan in plans}.items():
        parts = map(_describe, (scheme.estimator, scheme.grouper, scheme.solver))
        console.print(f"[bold]{escape(rule)}[/]: {escape(', '.join(parts))}", highlight=False)
    print_warnings(console, destroying_grids(plans))
    if recipe.serializer.runtimes_fuse_layers:
        print_warnings(console, differing_neighbours(plans))


def _calibration(
    recipe: "Recipe", model: "Model", plans: "Sequence[LayerPlan]", drawn: "Drawn | None"
) -> "tuple[int, str]":
    """The bytes of sums that are taken from disk in the place of calibration, and a sentence on what is kept there.

    No bytes and no sentence where nothing is.
    """
    from dashq.quantizing.kept import Kept, bytes_to_keep
    from dashq_cli.plan_table import size

    folder = recipe.keep
    if folder is None:
        return 0, ""
    bytes_on_disk = f"up to {size(bytes_to_keep(plans))} on disk"
    kept = Kept.of(recipe, model, plans, drawn.samples) if drawn else None
    if kept is None:
        text = "the text is on the hub, and not read by a plan"
        return 0, f"calibration: read from {folder} where it was kept before, else kept there, {bytes_on_disk}: {text}"
    there = kept.bytes_there
    if kept.there == kept.parts.keys():
        return there, f"calibration: not done again, but read from {kept.folder}, {size(there)}"
    partly = f"; {len(kept.there)} of its {len(kept.parts)} parts are there" if kept.there else ""
    reasons = kept.others()
    other = f"; what is kept there is of something else: {reasons}" if reasons and not partly else ""
    return 0, f"calibration: what it learns is kept in {kept.folder}, {bytes_on_disk}{partly}{other}"


def _print_totals(
    console: Console, recipe: "Recipe", model: "Model", plans: "Sequence[LayerPlan]", calibration: tuple[int, str]
) -> None:
    """Print how large the result will be, and what the run takes; `calibration` is of `_calibration`."""
    from dashq.data import average_bits
    from dashq.device import in_words
    from dashq.estimate import estimate
    from dashq.model.outside import parameter_count
    from dashq_cli.plan_table import size
    from dashq_cli.progress import counted, duration, print_warnings

    print_warnings(console, model.warnings)
    weights = sum(plan.layer.weights for plan in plans)
    total = sum(plan.bytes for plan in plans)
    taken, sentence = calibration
    costs = estimate(model, plans, recipe, taken=taken or None)
    skipped = [layer.name for layer in model.layers() if layer.name not in {plan.layer.name for plan in plans}]
    if skipped:
        console.print(f"skipped: {escape(counted(skipped))}", highlight=False)
    console.print(f"{len(plans)} layers in {len(model.blocks)} blocks, {weights:,} weights")
    inside = [plan for plan in plans if plan.layer.role == "linear"]
    for plan in plans:
        if plan.layer.role != "linear":
            name = _OUTSIDE[plan.layer.role]
            console.print(f"{name}: {plan.bits_per_weight:.3f} bits per weight, {size(plan.bytes)}")
    average = average_bits((plan.layer, plan.bytes) for plan in plans)
    packed = size(sum(plan.bytes for plan in inside or plans))
    console.print(f"[bold]{average:.3f}[/] bits per weight with scales and offsets, {packed}")
    console.print(
        f"not quantized ({', '.join(_kept(plans))}): {size(costs.other_bytes)}; "
        f"[bold]{size(total + costs.other_bytes)}[/] in all"
    )
    whole = 8 * (total + costs.other_bytes) / parameter_count(model.network)
    console.print(f"[bold]{whole:.3f}[/] bits per parameter, all weights taken together")
    if pausing := costs.pausing:
        held = size(pausing.memory)
        how = f"once, and its passes hold {held} while they pause"
        if not pausing.fits:
            how = f"anew before each; to pause would take {held}, of half the free memory"
        console.print(f"layers in turn: each block is passed {how}", highlight=False)
    if recipe.tuner and costs.tuning:
        console.print(
            f"[bold]tuner[/]: {escape(_describe(recipe.tuner))}, {recipe.tuner.steps:,} steps on "
            f"{costs.tuning.tokens:,} tokens: memory about {size(costs.tuning.memory)}, of the time about "
            f"{duration(costs.tuning.seconds)}",
            highlight=False,
        )
    if sentence:
        console.print(sentence, highlight=False, markup=False)
    computed = in_words(model.device, model.dtype)
    took = f"time about {duration(costs.seconds)} {computed}"
    console.print(f"peak memory about {size(costs.memory)}, {took}; compiling kernels, in a first run, not counted")


def _print_processes(
    console: Console, recipe: "Recipe", model: "Model", plans: "Sequence[LayerPlan]", processes: int
) -> None:
    """Print how several processes would share the work, and what each takes."""
    from dashq.calibration.shares import Shares
    from dashq.estimate import estimate
    from dashq_cli.plan_table import size
    from dashq_cli.progress import duration

    shares = Shares.of(plans, recipe.calibration)
    shares.check(processes)
    costs = estimate(model, plans, recipe, processes)
    alone, tuning = ["writing"], []
    if recipe.tuner:
        tuning = ["the tuner's text and checks"]
        if recipe.tuner.batch > 1:
            tuning.append(f"the {recipe.tuner.batch} samples of a tuner's step")
        else:
            alone.insert(0, "the tuner's steps, which have one sample each (tuner.batch: 1)")
    console.print(
        f"with {processes} processes: peak memory about {size(costs.memory)} each, time about "
        f"{duration(costs.seconds)} and what it takes to send; the same result",
        highlight=False,
    )
    together = ["the layers to solve", *["measuring"] * recipe.measures, "judging", *tuning]
    console.print(
        f"shared: {shares.count} shares of samples, {', '.join(together)}; by the first process alone: "
        f"{', '.join(alone)}. All read the model's files; the output need not be on a shared disk",
        highlight=False,
    )


def _kept(plans: "Sequence[LayerPlan]") -> list[str]:
    """The parts of a model that these plans leave as they are, in words."""
    roles = {plan.layer.role for plan in plans}
    embeddings = [] if roles & {"embeddings", "tied"} else ["embeddings"]
    head = [] if roles & {"head", "tied"} else ["head"]
    return [*embeddings, "norms", *head, "skipped layers"]


def _settled(recipe: "Recipe", model: "Model") -> "tuple[Recipe, list[str]]":
    """The recipe with the choices of an earlier measurement, and notes; where there was none, as it is."""
    from dashq.measuring.choosing import choices_for, settle
    from dashq.results.folder import ANALYSIS
    from dashq_cli.progress import counted

    if not recipe.measures:
        return recipe, []
    earlier, misfits = _earlier(recipe, model, choices_for(recipe, model))
    if earlier is None:
        stale = f" (that in {ANALYSIS} is of something else: {'; '.join(misfits)})" if misfits else ""
        return recipe, [
            f"[yellow]note[/] critical layers and a budget wait for a measurement{escape(stale)}: `dashq run` measures "
            "first, `dashq analyze` measures now. Until then this is the plan without them"
        ]
    recipe, selections = settle(recipe, model, earlier)
    sentences = [f"{selection.what}: {counted(selection.layers)}" for selection in selections]
    return recipe, [f"[bold]chosen[/] {escape(sentence)}" for sentence in sentences]


def _forecast(recipe: "Recipe", model: "Model", plans: "Sequence[LayerPlan]") -> str:
    """A sentence on what the plans are expected to cost the model's predictions, from an earlier measurement."""
    from dashq.results.folder import ANALYSIS

    earlier, _ = _earlier(recipe, model, {plan.layer.name: [plan] for plan in plans})
    if earlier is None:
        return "expected loss of the model's predictions: not measured; `dashq analyze` with a recipe measures it"
    loss = earlier.expected_loss(plans)
    return f"expected loss of the model's predictions: {loss:.3g} nats per token, from {ANALYSIS}"


def _earlier(recipe: "Recipe", model: "Model", choices: "Choices") -> "tuple[Analysis | None, list[str]]":
    """The measurement in the output folder that answers for these choices, or why the one there does not."""
    from dashq.measuring.analysis import Analysis
    from dashq.results.fingerprint import inputs_of

    earlier = Analysis.load(recipe.output)
    misfits = earlier.misfits(recipe, choices, inputs_of(model, recipe)) if earlier else []
    return (None if misfits else earlier), misfits


def _describe(strategy: "Strategy") -> str:
    """A strategy with its parameters, as `NAME(size=64, uneven=error)`."""
    fields = ", ".join(f"{key}={value}" for key, value in strategy if value is not None)
    return f"{strategy.name}({fields})" if fields else strategy.name
