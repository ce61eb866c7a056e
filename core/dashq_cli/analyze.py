"""`dashq analyze`."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dashq_cli.imports import starting
from dashq_cli.processes import Processes, among
from dashq_cli.quantize import RecipePath, Settings

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

    from dashq import LayerPlan, Recipe
    from dashq.measuring.analysis import Analysis, Choice, Choices, LayerAnalysis
    from dashq.model.decoder import Model

COSTLIEST = 10  # layers that are shown unless all are asked for
CONTEXT = 256  # tokens of a window for --kl, where none are asked for and the model can take them


def analyze(
    recipe: RecipePath,
    settings: Settings = [],  # noqa: B006 - typer wants a list
    bits: Annotated[
        str,
        typer.Option(help="Further bits to measure, as far as the format holds them."),
    ] = "2,3,4",
    kl: Annotated[
        bool, typer.Option("--kl", help="Also quantize one layer at a time in the whole model, and measure the loss.")
    ] = False,
    text: Annotated[str, typer.Option(help="The text for --kl: its held-out part.")] = "pydoc",
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window of that text; if not given 256, or as many as it has positions."),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of that text.")] = 2,
    snr: Annotated[
        str | None,
        typer.Option(metavar="REGEX", help="Show instead the signal-to-noise of H in the layers of matching names."),
    ] = None,
    plot: Annotated[
        Literal["svg", "png"] | None, typer.Option(help="Draw the figures into a file of the output folder.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Measure anew even if the output folder holds a measurement.")
    ] = False,
    all_layers: Annotated[bool, typer.Option("--layers", help="Show all layers, not only the costliest.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    processes: Processes = 1,
) -> None:
    """Measure what quantizing each layer of RECIPE costs the model.

    Layers are measured at the bits of their scheme, of the budget and of
    --bits; nothing is quantized. Shows the costliest first, and writes
    analysis.json into the recipe's output folder, where `dashq run` and
    `dashq plan` look for it. With --processes, or with torchrun, the samples
    and the layers are shared; --kl is for one process.
    """
    with among(processes) as is_first:
        with starting():
            import dashq

            resolved = dashq.load_recipe(recipe, dashq.load_registry(), settings)

            # Only now, since a mistake in a recipe is found in less time than these take.
            from dashq.calibration.tokens import draw_for
            from dashq.measuring.choosing import choices_for, measured, stored
            from dashq.processes.group import check_alike, here
            from dashq.quantizing.opening import open_model
            from dashq.results.fingerprint import inputs_of, work_of
            from dashq.results.folder import ANALYSIS, check_folder, make_folder
            from dashq.results.lock import locked

        if kl:
            _check_alone(here().count)
        charts = _charts() if plot else None
        model = open_model(resolved)
        choices = choices_for(resolved, model, _numbers(bits))
        names = _matching(snr, list(choices)) if snr is not None else []
        held_out = _held_out(model, text, context, windows) if kl else None
        if is_first:
            check_folder(resolved.output, resolved.format_files)  # a result there stays as it is
        tokens = draw_for(model, resolved.calibration).samples
        inputs = inputs_of(model, resolved, tokens)
        check_alike({**work_of(resolved, inputs), "--bits": bits})
        if not is_first:
            if here().of_first(lambda: None):
                measured(resolved, model, choices, tokens, inputs)
            return
        make_folder(resolved.output)
        with locked(resolved.output):
            analysis = None if overwrite else stored(resolved, choices, inputs)
            was_read = analysis is not None and (not kl or analysis.rank_correlation is not None)
            here().of_first(lambda: not was_read)
            if analysis is None or not was_read:
                analysis = _measure(_Task(resolved, model, choices, tokens, inputs), held_out, quiet)
        noisy = [analysis.by_name[name] for name in names]
        if not quiet:
            _show(analysis, noisy, None if all_layers else COSTLIEST)
            took = f"{analysis.seconds:.0f} seconds {analysis.computed}"
            how = f"it took {took}"
            if was_read:
                how = f"read from disk: measuring it took {took}, --overwrite does it anew"
            Console().print(how, highlight=False, markup=False)
            typer.echo(f"the analysis is in {resolved.output / ANALYSIS}")
        if charts:
            path = resolved.output / f"analysis-{'snr' if noisy else 'sensitivity'}.{plot}"
            charts.save(charts.noise(noisy) if noisy else charts.sensitivity(analysis.layers), path)


def _check_alone(processes: int) -> None:
    """Raise a `UsageError` where several processes are asked for what one does."""
    from dashq.errors import UsageError

    if processes > 1:
        raise UsageError(
            f"--kl quantizes one layer at a time in the whole model, which one process does, not {processes}: leave "
            "out --kl, or --processes"
        )


def _show(analysis: "Analysis", layers: "list[LayerAnalysis]", most: int | None) -> None:
    """Print the costs of layers, at `most` so many where there is a limit, or the noise of those that are asked for."""
    console = Console()
    console.print(_noise_table(layers) if layers else _table(analysis, most))
    for sentence in _totals(analysis, most):
        console.print(sentence, highlight=False, markup=False)


def _charts() -> ModuleType:
    """The module that draws; a `MissingPackageError` where what it needs is not installed."""
    from dashq.errors import MissingPackageError

    try:
        from dashq_cli import charts
    except ImportError as error:
        raise MissingPackageError(
            f"--plot needs matplotlib, which is not installed: pip install 'dashq[plot]' ({error})"
        ) from error
    return charts


def _numbers(text: str) -> list[int]:
    """The numbers of bits in a list such as `2,3,4`."""
    from dashq.errors import UsageError

    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdigit() and 1 <= int(word) <= 8 for word in words):
        raise UsageError(f"--bits {text}: expected numbers from 1 to 8 with commas between, such as 2,3,4")
    return [int(word) for word in words]


def _matching(pattern: str, names: list[str]) -> list[str]:
    """The layers whose whole name a pattern matches."""
    from dashq.errors import UsageError
    from dashq.recipe.patterns import check_patterns, compiled

    try:
        expression = compiled(pattern)
    except ValueError as error:
        raise UsageError(f"--snr: {error}") from error
    check_patterns([pattern], names)
    matches = [name for name in names if expression.fullmatch(name)]
    if not matches:
        raise UsageError(
            f"--snr {pattern} matches no layer; a match is for the whole name. The first layers are: "
            + ", ".join(names[:8])
        )
    return matches


def _held_out(model: "Model", text: str, context: int | None, windows: int) -> "Int64[Tensor, 'windows context']":
    """The text that divergences are measured on: a part that calibration does not see."""
    from dashq.calibration.tokens import evaluation_windows
    from dashq.model.capacity import check_length, check_tokens, usual_length
    from dashq.text_source import TextSource

    tokenizer, config = model.tokenizer, model.network.config
    context = context or usual_length(CONTEXT, [config])
    check_length(context, config, "--context")
    source = TextSource(name=text, split="validation" if text == "c4" else "test")
    pieces = evaluation_windows(source, tokenizer, context, windows)
    check_tokens(pieces, config, tokenizer)
    return pieces


@dataclass(frozen=True)
class _Task:
    """All that a measurement is made from."""

    recipe: "Recipe"
    model: "Model"
    choices: "Choices"
    tokens: "Int64[Tensor, 'samples tokens']"
    inputs: dict[str, str]


def _measure(task: _Task, held_out: "Int64[Tensor, 'windows context'] | None", quiet: bool) -> "Analysis":
    """Measure and save what the choices cost, behind a progress bar; with a held-out text also the true losses."""
    from dashq.data import Quantized
    from dashq.measuring.choosing import measured
    from dashq.measuring.divergence import confirm
    from dashq.measuring.evaluate import load_model
    from dashq.measuring.sensitivity import analyze
    from dashq.results.events import Event, Measuring

    recipe, model, choices = task.recipe, task.model, task.choices
    by_scheme: dict[str, Quantized] = {}

    def keep(plan: "LayerPlan", quantized: Quantized) -> None:
        by_scheme.setdefault(plan.layer.name, quantized)  # a layer's first choice is that of its scheme

    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress:
        bar = progress.add_task("reading the model", total=None)

        def hear(event: Event) -> None:
            if isinstance(event, Measuring):
                what = f"measuring {event.what}"
                progress.update(bar, description=what, completed=event.done, total=event.steps)

        if held_out is None:
            return measured(recipe, model, choices, task.tokens, task.inputs, recipe.output, hear)
        analysis = analyze(recipe, model, choices, hear, keep, task.tokens)
        loaded = load_model(recipe.model, recipe.device, recipe.dtype, recipe.trust_remote_code)
        steps = len(choices)
        analysis = confirm(
            analysis.model_copy(update={"inputs": task.inputs}),
            loaded.network,
            model.blocks,
            by_scheme,
            held_out,
            lambda done: hear(Measuring("divergences", done, steps)),
        )
        analysis.save(recipe.output)
        return analysis


def _table(analysis: "Analysis", most: int | None) -> Table:
    """Sensitivities by choice, in thousandths of a nat; experts that share a stack together, the costliest first."""
    kinds = sorted({_kind(choice) for layer in analysis.layers for choice in layer.choices})
    sizes_differ = len({size for _, size in kinds}) > 1
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for bits, size in kinds:
        table.add_column(f"{bits} bits/{size}" if sizes_differ else f"{bits} bits", justify="right", no_wrap=True)
    confirmed = analysis.rank_correlation is not None
    for heading in ("error", *(["KL"] if confirmed else []), "snr"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, layers in sorted(together(analysis.layers).items(), key=lambda row: -_cost(row[1]))[:most]:
        costs = [
            sum(choice.sensitivity for layer in layers for choice in layer.choices if _kind(choice) == kind)
            for kind in kinds
        ]
        divergences = [layer.divergence for layer in layers if layer.divergence is not None]
        noises = [_median(layer.signal_to_noise.off_diagonal) for layer in layers if layer.signal_to_noise]
        table.add_row(
            escape(name),
            *(f"{1000 * cost:.3g}" if cost else "–" for cost in costs),
            f"{mean(layer.choices[0].error for layer in layers):.4f}",
            *([f"{1000 * sum(divergences):.3g}"] if confirmed else []),
            f"{mean(noises):.2f}" if noises else "–",
        )
    return table


def _noise_table(layers: "list[LayerAnalysis]") -> Table:
    """Medians and the middle half of the entries' signal-to-noise."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    for heading in ("batches", "on the diagonal", "off the diagonal"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in layers:
        noise = layer.signal_to_noise
        cells = (str(noise.batches), _middle(noise.diagonal), _middle(noise.off_diagonal)) if noise else ("–",) * 3
        table.add_row(escape(layer.name), *cells)
    return table


def _totals(analysis: "Analysis", most: int | None) -> Iterator[str]:
    """Sentences about all layers together, and about the columns of the table."""
    first, layers = analysis.layers[0].choices[0], analysis.layers
    total, rows = _cost(layers), sorted(map(_cost, together(layers).values()), reverse=True)
    if len(rows) > len(rows[:most]) and total:
        yield (
            f"the {most} costliest of {len(rows)} lines, which bear {sum(rows[:most]) / total:.0%} of the expected "
            "loss; --layers shows all"
        )
    yield (
        "bits: expected loss of the model's predictions, in thousandths of a nat per token; error: of the layer's "
        f"outputs, at {first.bits} bits; snr: median signal-to-noise of H off its diagonal"
    )
    yield f"expected loss of all layers as the scheme says: {total:.4g} nats per token"
    if analysis.rank_correlation is not None:
        measured = sum(layer.divergence or 0.0 for layer in layers)
        yield (
            f"KL: measured with one layer quantized at a time, {measured:.4g} nats per token together; its rank "
            f"correlation with the expected loss is {analysis.rank_correlation:.3f}"
        )


def _cost(layers: "Sequence[LayerAnalysis]") -> float:
    """The expected loss of layers together, stored as their scheme says, in nats per token."""
    return sum(layer.choices[0].sensitivity for layer in layers)


def together(layers: "Sequence[LayerAnalysis]") -> "dict[str, list[LayerAnalysis]]":
    """The layers by name; the experts of one stack together, with a star for their numbers."""
    rows: dict[str, list[LayerAnalysis]] = defaultdict(list)
    for layer in layers:
        rows[layer.layer.stack or layer.name].append(layer)
    return rows


def _kind(choice: "Choice") -> tuple[int, int]:
    return choice.bits, choice.size


def _middle(quantiles: "Sequence[float]") -> str:
    """The median, and where the middle half of the entries lies."""
    _, low, median, high, _ = quantiles
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _median(quantiles: "Sequence[float]") -> float:
    return quantiles[len(quantiles) // 2]
