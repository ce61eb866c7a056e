"""`dashq eval`."""

import json
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
    from jaxtyping import Int64
    from torch import Tensor

    from dashq.measuring.evaluate import Loaded
    from dashq.recipe.recipe import Beginning

CONTEXT = 2048  # tokens of a window, where none are asked for and the models can take them


@dataclass
class Verdict:
    """The figures of one model; `seconds` are those of its quantization, not of its evaluation."""

    model: str
    perplexity: dict[str, float] = field(default_factory=dict)
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    kernels: Annotated[
        str, typer.Option(help="What multiplies with packed layers: auto, exact or a kernel by name.")
    ] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file as well.")] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure perplexity and lm-eval tasks of models, side by side.

    Originals come first, as far as they are on this machine: only models that
    are named here are downloaded. Without --text and --tasks, perplexity is
    measured on the held-out part of pydoc, which is always there.
    """
    with starting():
        from dashq.device import choose_device, choose_dtype
        from dashq.measuring.evaluate import (
            check_prompt,
            continue_text,
            find_tasks,
            kernel_divergence,
            load_model,
            read_windows,
            run_tasks,
        )
        from dashq.model.capacity import usual_length
        from dashq.model.loading import read_config
        from dashq.model.location import locate
        from dashq.runtime.kernel_choice import EXACT, check_kernels
        from dashq.runtime.kernel_use import kernels_in_use
        from dashq.text_source import TextSource

    names = [task for task in tasks.split(",") if task]
    texts = text or ([] if names else ["pydoc"])
    sources = [TextSource(name=name, split=split or ("validation" if name == "c4" else "test")) for name in texts]
    everyone = models if no_original else _with_originals(models)
    check_kernels(kernels)
    choose_dtype(dtype, choose_device(device))  # refused before texts are read
    _check(json_file)
    # Originals were found on this machine.
    locations = {model: locate(model, trust_remote_code, download=model in models) for model in everyone}
    manager = find_tasks(names, include_path) if names else None
    begun: Beginning = "auto" if beginning == "auto" else beginning == "true"
    length = context or usual_length(CONTEXT, map(read_config, locations.values()))
    if sources and length < CONTEXT and context is None:
        typer.echo(f"note: windows of {length} tokens, as many as the models have positions", err=True)
    pieces = {model: read_windows(locations[model], sources, length, windows, begun) for model in everyone}
    if prompt is not None:
        for location in locations.values():
            check_prompt(location, prompt)
    verdicts = []
    for model in everyone:
        loaded = load_model(model, device, dtype, trust_remote_code, model in models, kernels)
        verdict = _describe(model, loaded)
        for text_name, text_windows in pieces[model].items():
            verdict.perplexity[text_name] = _measure(loaded, text_name, text_windows, begun)
        if names:
            verdict.tasks = {task: dict(scores) for task, scores in run_tasks(loaded, names, manager, limit).items()}
        if prompt is not None:
            verdict.continuation = continue_text(loaded, prompt)
        verdict.kernels = kernels_in_use(loaded.network)
        if verdict.kernels.keys() - {EXACT} and pieces[model]:
            verdict.kernel_divergence = kernel_divergence(loaded.network, next(iter(pieces[model].values()))[0])
        verdicts.append(verdict)
    _print(Console(), verdicts, prompt)
    if json_file:
        _write(json_file, verdicts)


def _check(json_file: Path | None) -> None:
    """Refuse what can be refused before anything is measured, which can take hours."""
    from dashq.errors import OutputError

    if json_file and not json_file.absolute().parent.is_dir():
        raise OutputError(f"cannot write the figures to {json_file}: there is no folder {json_file.absolute().parent}")


def _with_originals(models: list[str]) -> list[str]:
    """The models that the quantized ones were made from, where they are on this machine, then all that were named."""
    from dashq.errors import CheckpointError
    from dashq.model.location import locate

    originals = []
    for name in dict.fromkeys(recipe["model"] for recipe in (_recipe(Path(model)) for model in models) if recipe):
        try:
            if name not in models:
                locate(name, download=False)
            originals.append(name)
        except CheckpointError:
            typer.echo(f"note: {name}, the original, is not on this machine; name it to download it", err=True)
    return list(dict.fromkeys(originals + models))


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


def _measure(loaded: "Loaded", text: str, windows: "Int64[Tensor, 'windows context']", beginning: "Beginning") -> float:
    from dashq.measuring.evaluate import perplexity
    from dashq.model.tokenizing import beginning_tokens

    unjudged = max(1, len(beginning_tokens(loaded.tokenizer, beginning)))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        label = escape(f"{loaded.name} on {text}")
        task = progress.add_task(label, total=len(windows))
        return perplexity(
            loaded.network,
            windows,
            lambda done, so_far: progress.update(task, completed=done, description=f"{label}: {so_far:.2f}"),
            unjudged,
        )


def _write(path: Path, verdicts: list[Verdict]) -> None:
    from dashq.errors import OutputError

    try:
        path.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    except OSError as error:
        raise OutputError(f"cannot write the figures to {path}: {error.strerror}") from error


def _print(console: Console, verdicts: list[Verdict], prompt: str | None) -> None:
    table = Table("model", box=None, header_style="bold", pad_edge=False)
    texts, tasks = list(verdicts[0].perplexity), list(verdicts[0].tasks)
    headings = [f"perplexity {text}" for text in texts]
    for heading in map(escape, [*headings, "bits/\nweight", "bits/\nparameter", "MB on\ndisk", "seconds", *tasks]):
        table.add_column(heading, justify="right")
    for verdict in verdicts:
        table.add_row(
            escape(verdict.model),
            *(f"{verdict.perplexity[text]:,.2f}" for text in texts),
            f"{verdict.bits_per_weight:.2f}" if verdict.bits_per_weight else "–",
            f"{verdict.bits_per_parameter:.2f}" if verdict.bits_per_parameter else "–",
            f"{verdict.bytes_on_disk / 1e6:.1f}",
            f"{verdict.seconds:.0f}" if verdict.seconds else "–",
            *(_score(verdict.tasks[task]) for task in tasks),
        )
    console.print(table)
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


def _score(metrics: dict[str, float]) -> str:
    """A task's main figure: the length-normalised accuracy where there is one."""
    main = next((metrics[key] for key in ("acc_norm", "acc", "exact_match") if key in metrics), None)
    return f"{100 * main:.2f}" if main is not None else ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
