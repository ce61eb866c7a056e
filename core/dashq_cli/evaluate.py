"""`dashq eval`."""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from dashq_cli.formats import Trust
from dashq_cli.imports import starting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Int64
    from torch import Tensor

    from dashq.measuring.evaluate import Loaded, Reference
    from dashq.recipe.recipe import Beginning

LEAST_NAME = 16  # columns of the terminal for a model's name
FIGURES = (  # headings of figures, and how they are written
    ("bits/\nweight", "bits_per_weight", ".2f"),
    ("bits/\nparameter", "bits_per_parameter", ".2f"),
    ("tokens/s\nread", "tokens_per_second", ",.0f"),
    ("tokens/s\nwritten", "written_per_second", ",.1f"),
)
CONTEXT = 2048  # tokens of a window, where none are asked for and the models can take them


@dataclass
class Verdict:
    """The figures of one model, those of predictions by text; None stands for what is no number.

    Divergence and agreement are from `original`, errors are standard errors, and `seconds` those of the model's
    quantization. `tokens_per_second` are read, `written_per_second` those of the continuation.
    """

    model: str
    original: str | None = None
    perplexity: dict[str, float | None] = field(default_factory=dict)
    perplexity_error: dict[str, float | None] = field(default_factory=dict)
    divergence: dict[str, float | None] = field(default_factory=dict)
    divergence_error: dict[str, float | None] = field(default_factory=dict)
    agreement: dict[str, float | None] = field(default_factory=dict)
    agreement_error: dict[str, float | None] = field(default_factory=dict)
    tokens_per_second: float | None = None
    written_per_second: float | None = None
    bits_per_weight: float | None = None
    bits_per_parameter: float | None = None
    bytes_on_disk: int = 0
    seconds: float | None = None
    computed: str = ""
    kernels: dict[str, int] = field(default_factory=dict)
    kernel_divergence: tuple[float, float] | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    continuation: str | None = None


def evaluate(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Results of dashq, or any other model.")],
    text: Annotated[
        list[str],
        typer.Option(help="A text to measure perplexity on: pydoc, wikitext2, c4, a local file, a hub dataset."),
    ] = [],  # noqa: B006 - typer wants a list
    split: Annotated[
        str | None, typer.Option(help="The part of the texts; if none is named test, for c4 validation.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window; if not given 2048, or as many as the models have positions."),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="At most this many windows of each text.")] = None,
    beginning: Annotated[
        Literal["auto", "true", "false"],
        typer.Option(help="Begin each window with the token for that: always, never, or as the tokenizer does."),
    ] = "auto",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, with commas between.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="A folder with more lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many questions of each task.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Also show how each model goes on after this.")] = None,
    no_original: Annotated[
        bool, typer.Option("--no-original", help="Do not judge the original of a quantized model beside it.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare all predictions with this model's, not with each one's original."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kernels: Annotated[
        str, typer.Option(help="What multiplies with packed layers: auto, exact or a kernel by name.")
    ] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure perplexity and lm-eval tasks of models, side by side.

    Beside an original, also how far predictions diverge from its own, and how
    often both expect the same token most. ± is one standard error. Originals
    come first, as far as they are on this machine: only models that are named
    here are downloaded. Without --text and --tasks, texts are the held-out part
    of pydoc, which is always there.
    """
    with starting():
        from dashq.device import choose_device, choose_dtype
        from dashq.measuring.evaluate import (
            Reference,
            check_prompt,
            continue_text,
            find_tasks,
            kernel_divergence,
            load_model,
            read_windows,
            run_tasks,
        )
        from dashq.model.capacity import usual_length
        from dashq.model.loading import read_config, read_tokenizer
        from dashq.model.location import locate
        from dashq.runtime.kernel_choice import EXACT, check_kernels
        from dashq.runtime.kernel_use import kernels_in_use
        from dashq.text_source import TextSource

    names = [task for task in tasks.split(",") if task]
    texts = text or ([] if names else ["pydoc"])
    sources = [TextSource(name=name, split=split or ("validation" if name == "c4" else "test")) for name in texts]
    originals = dict.fromkeys(models, against) if against else {} if no_original else _originals(models)
    everyone = _in_order(models, originals)
    named = {*models, against}
    check_kernels(kernels)
    choose_dtype(dtype, choose_device(device))  # refused before texts are read
    _check(json_file)
    # Originals were found on this machine.
    locations = {model: locate(model, trust_remote_code, download=model in named) for model in everyone}
    manager = find_tasks(names, include_path) if names else None
    begun: Beginning = "auto" if beginning == "auto" else beginning == "true"
    length = context or usual_length(CONTEXT, map(read_config, locations.values()))
    if sources and length < CONTEXT and context is None:
        typer.echo(f"note: windows of {length} tokens, as many as the models have positions", err=True)
    pieces = {model: read_windows(locations[model], sources, length, windows, begun) for model in everyone}
    if prompt is not None:
        for location in locations.values():
            check_prompt(read_config(location), read_tokenizer(location), prompt)
    verdicts = []
    references: dict[str, Reference] = {}
    for model in everyone:
        loaded = load_model(model, device, dtype, trust_remote_code, model in named, kernels)
        verdict = _describe(model, loaded)
        own = Reference(loaded.network) if model in originals.values() else None
        other = originals.get(model, "")
        reference = references.get(other)
        for text_name, text_windows in pieces[model].items():
            alike = reference is not None and pieces[other][text_name].equal(text_windows)
            _measure(verdict, loaded, text_name, text_windows, begun, own, reference if alike else None)
        verdict.original = other if verdict.divergence else None
        if names:
            verdict.tasks = {task: dict(scores) for task, scores in run_tasks(loaded, names, manager, limit).items()}
        if prompt is not None:
            writing = continue_text(loaded, prompt)
            verdict.continuation, verdict.written_per_second = writing.text, writing.tokens / writing.seconds
        verdict.kernels = kernels_in_use(loaded.network)
        if verdict.kernels.keys() - {EXACT} and pieces[model]:
            verdict.kernel_divergence = kernel_divergence(loaded.network, next(iter(pieces[model].values()))[0])
        verdicts.append(verdict)
        if own:
            own.release()
            references = {model: own}  # the models that are compared with it follow
        del loaded  # before the next one is read
    _print(Console(), verdicts, prompt)
    if json_file:
        _write(json_file, verdicts)


def _check(json_file: Path | None) -> None:
    """Refuse what can be refused before anything is measured, which can take hours."""
    from dashq.errors import OutputError

    if json_file and not json_file.absolute().parent.is_dir():
        raise OutputError(f"cannot write the figures to {json_file}: there is no folder {json_file.absolute().parent}")


def _originals(models: list[str]) -> dict[str, str]:
    """The models that quantized ones were made from, by the names of these, as far as they are on this machine."""
    from dashq.errors import CheckpointError
    from dashq.model.location import locate

    originals, missing = {}, set()
    for model in models:
        name = (_recipe(Path(model)) or {}).get("model")
        if name is None or name in missing:
            continue
        try:
            if name not in models:
                locate(name, download=False)
            originals[model] = name
        except CheckpointError:
            missing.add(name)
            typer.echo(f"note: {name}, the original, is not on this machine; name it to download it", err=True)
    return originals


def _in_order(models: list[str], originals: "Mapping[str, str]") -> list[str]:
    """Each original, followed by the models that are compared with it; then all others."""
    order = [
        name
        for original in dict.fromkeys(originals.values())
        for name in (original, *(model for model in models if originals.get(model) == original))
    ]
    return list(dict.fromkeys([*order, *models]))


def _recipe(folder: Path) -> dict[str, Any] | None:
    import yaml

    from dashq.errors import refusing

    path = folder / "recipe.yaml"
    if not path.exists():
        return None
    with refusing(f"{path} is not as dashq writes it"):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    return recipe if isinstance(recipe, dict) and isinstance(recipe.get("model"), str) else None


def _describe(model: str, loaded: "Loaded") -> Verdict:
    from dashq.results.report import REPORT, read_report

    verdict = Verdict(model, bytes_on_disk=loaded.bytes_on_disk, computed=loaded.computed)
    if (Path(model) / REPORT).exists():
        report = read_report(Path(model))
        verdict.bits_per_weight = report.totals.bits_per_weight
        verdict.bits_per_parameter = report.totals.bits_per_parameter or None
        verdict.seconds = sum(report.seconds.values())
    else:
        verdict.bits_per_parameter = 8 * loaded.bytes_on_disk / loaded.network.num_parameters()
        verdict.bits_per_weight = verdict.bits_per_parameter
    return verdict


def _measure(
    verdict: Verdict,
    loaded: "Loaded",
    text: str,
    windows: "Int64[Tensor, 'windows context']",
    beginning: "Beginning",
    own: "Reference | None",
    other: "Reference | None",
) -> None:
    """Put the figures of one text into the verdict; `own` keeps the predictions, which `other` has of the original."""
    from dashq.measuring.evaluate import read
    from dashq.measuring.predictions import exponential
    from dashq.model.tokenizing import beginning_tokens

    unjudged = max(1, len(beginning_tokens(loaded.tokenizer, beginning)))
    with (
        Progress(console=Console(stderr=True), transient=True) as progress,
        own.reading(text) if own else nullcontext(),
    ):
        label = escape(f"{loaded.name} on {text}")
        task = progress.add_task(label, total=len(windows))
        reading = read(
            loaded.network,
            windows,
            lambda done, so_far: progress.update(task, completed=done, description=f"{label}: {so_far:.2f}"),
            unjudged,
            (other, text) if other else None,
        )
    figures = reading.predictions
    verdict.perplexity[text], verdict.perplexity_error[text] = exponential(figures.loss)
    verdict.tokens_per_second = reading.tokens / reading.seconds
    if other:
        verdict.divergence[text], verdict.divergence_error[text] = figures.divergence.value, figures.divergence.error
        verdict.agreement[text], verdict.agreement_error[text] = figures.agreement.value, figures.agreement.error


def _write(path: Path, verdicts: list[Verdict]) -> None:
    from dashq.errors import OutputError

    try:
        path.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    except OSError as error:
        raise OutputError(f"cannot write the figures to {path}: {error.strerror}") from error


def _print(console: Console, verdicts: list[Verdict], prompt: str | None) -> None:
    columns = _columns(verdicts)
    name_width = max(LEAST_NAME, min(max(len(verdict.model) for verdict in verdicts), console.width // 3))
    while columns:
        room, table = console.width - name_width, Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("model", overflow="fold", vertical="bottom")
        shown: list[list[str]] = []
        for heading, cells in columns:
            room -= 2 + max(map(len, [*heading.split("\n"), *cells]))
            if shown and room < 0:
                break
            shown.append(cells)
            table.add_column(escape(heading), justify="right", vertical="bottom", no_wrap=True)
        for verdict, *cells in zip(verdicts, *shown, strict=True):
            table.add_row(escape(verdict.model), *map(escape, cells))
        console.print(table)
        columns = columns[len(shown) :]  # those that do not fit stand below
    console.print(f"computed {', '.join(sorted({verdict.computed for verdict in verdicts}))}")
    for verdict in verdicts:
        if verdict.kernels:
            counts = ", ".join(f"{name} in {count} layers" for name, count in verdict.kernels.items())
            cost = ""
            if verdict.kernel_divergence:
                own, exact = verdict.kernel_divergence
                cost = f"; KL from float32 {own:.1e}, unpacked {exact:.1e} (first window)"
            console.print(f"kernels of {verdict.model}: {counts}{cost}", highlight=False, markup=False, soft_wrap=True)
    if prompt is not None:
        console.print(f"\n[bold]{escape(prompt)} …[/]")
        for verdict in verdicts:
            console.print(f"{verdict.model}: {verdict.continuation}", highlight=False, markup=False)


def _columns(verdicts: list[Verdict]) -> list[tuple[str, list[str]]]:
    """The columns of the table: headings of one or two lines, and a text for each model."""
    from dashq.results.judged import measured

    columns = []
    for text in verdicts[0].perplexity:
        own = [measured(verdict.perplexity[text], verdict.perplexity_error[text]) for verdict in verdicts]
        columns.append((f"perplexity\n{text}", own))
        if any(text in verdict.divergence for verdict in verdicts):
            columns.append((f"KL\n{text}", [_compared(verdict, text, "divergence") for verdict in verdicts]))
            columns.append((f"same first\n{text}", [_compared(verdict, text, "agreement") for verdict in verdicts]))
    for heading, figure, form in FIGURES:
        values = [getattr(verdict, figure) for verdict in verdicts]
        if any(values):
            columns.append((heading, [format(value, form) if value else "–" for value in values]))
    columns.append(("MB on\ndisk", [f"{verdict.bytes_on_disk / 1e6:.1f}" for verdict in verdicts]))
    return columns + [(task, [_score(verdict.tasks[task]) for verdict in verdicts]) for task in verdicts[0].tasks]


def _compared(verdict: Verdict, text: str, figure: Literal["divergence", "agreement"]) -> str:
    """A figure beside the original, or a dash for the original itself."""
    from dashq.results.judged import measured

    values, errors = getattr(verdict, figure), getattr(verdict, f"{figure}_error")
    if text not in values:
        return "–"
    if figure == "divergence" or values[text] is None:
        return measured(values[text], errors[text])
    return f"{measured(100 * values[text], 100 * (errors[text] or 0.0))} %"


def _score(metrics: dict[str, float]) -> str:
    """A task's main figure: the length-normalised accuracy where there is one."""
    main = next((metrics[key] for key in ("acc_norm", "acc", "exact_match") if key in metrics), None)
    return f"{100 * main:.2f}" if main is not None else ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
