"""The progress of a run on the terminal, and its summary."""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from dashq.results.events import BlockDone, Event, LayerDone, Measuring, PhaseBegun, RunStarted, Tuning
from dashq.results.folder import PAGE
from dashq.results.report import STARVED_TOKENS, MixtureReport, read_report


class Log(Protocol):
    """Hears of a run's events, between entering and leaving a `with` statement."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *details: object) -> None: ...
    def hear(self, event: Event) -> None: ...


class Silence:
    """`--quiet`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        return None

    def hear(self, event: Event) -> None:
        """Say nothing."""


class JsonLog(Silence):
    """`--log-json`: one object a line on the standard output, with the seconds since the first as `elapsed`."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def hear(self, event: Event) -> None:
        """Print the event at once, so that a reader of the pipe can follow."""
        content = asdict(event.report) if isinstance(event, LayerDone) else asdict(event)
        elapsed = round(time.monotonic() - self._began, 3)
        line = {"event": type(event).__name__, "elapsed": elapsed, **content}
        print(json.dumps(line), file=sys.stdout, flush=True)


class _Steps(ProgressColumn):
    """Steps done, and all of them, as `3/30`; nothing before their number is known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}", style="progress.download")


class _TimeLeft(ProgressColumn):
    """The time left, from that of the steps done; nothing before there is one."""

    def render(self, task: Task) -> Text:
        if not task.time_remaining or task.completed == 0:
            return Text()
        return Text(f"{timedelta(seconds=round(task.time_remaining))} left", style="progress.remaining")


class ProgressBar:
    """A bar over the blocks, then over the steps of a tuner, with the time left."""

    def __init__(self, console: Console, walk: str) -> None:
        """`walk` says what is done with the blocks."""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Steps(),
            TimeElapsedColumn(),
            TextColumn("elapsed"),
            _TimeLeft(),
            console=console,
        )
        self._task = self._progress.add_task("reading the model", total=None)
        self._walk, self._tunes = walk, False
        self._walk_now = ""  # with the device, once it is known

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._progress.stop()

    def hear(self, event: Event) -> None:
        """Move the bar."""
        if isinstance(event, PhaseBegun):
            self._progress.update(self._task, description=event.what)
        elif isinstance(event, Measuring):
            what = f"measuring {event.what}"
            self._progress.update(self._task, description=what, completed=event.done, total=event.steps)
        elif isinstance(event, RunStarted):
            self._walk_now = f"{self._walk} {event.computed}"
            self._progress.reset(self._task, description=self._walk_now, total=event.blocks)
            print_kept(self._progress.console, event)
            print_warnings(self._progress.console, event.warnings)
        elif isinstance(event, LayerDone):
            self._progress.update(self._task, description=self._walk_now)
        elif isinstance(event, BlockDone):
            self._progress.update(self._task, description=self._walk_now, advance=1)
        elif isinstance(event, Tuning):
            what = f"tuning, divergence {event.check.divergence:.3f}"
            if not self._tunes:  # the time left is that of its steps, not of the blocks before it
                self._progress.reset(self._task, total=event.steps)
                self._tunes = True
            self._progress.update(self._task, description=what, completed=event.check.step)


# A warning comes where more than this share of a stack's experts was starved.
STARVED_SHARE = 0.25
BARS = " ▁▂▃▄▅▆▇█"
BESIDE_BARS = 62  # columns of the terminal for what stands beside the bars
MIXTURES = 16  # that are shown


def _print_mixtures(console: Console, mixtures: Sequence[MixtureReport]) -> None:
    """Tokens of each expert as a chart of bars, and a warning for every mixture in which many were starved."""
    charts: dict[tuple[str, tuple[int, ...]], MixtureReport] = {}
    for mixture in mixtures:  # the layers of one mixture share their tokens
        charts.setdefault((mixture.mixture, mixture.tokens), mixture)
    if not charts:
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("calibration tokens in", overflow="fold", vertical="bottom")
    for heading in ("minimum", "median", "maximum", "shrunk\nup to"):
        table.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
    table.add_column("by expert", vertical="bottom", no_wrap=True)
    for mixture in list(charts.values())[:MIXTURES]:
        tokens = mixture.tokens
        row = [f"{value:,}" for value in (min(tokens), int(median(tokens)), max(tokens))]
        chart = bars(tokens, max(8, min(64, console.width - BESIDE_BARS)))
        table.add_row(escape(mixture.mixture), *row, f"{max(mixture.shrinkage):.0%}", chart)
    console.print(table)
    if len(charts) > MIXTURES:
        console.print(f"… and {len(charts) - MIXTURES} more in report.json")
    starved = [mixture for mixture in charts.values() if mixture.starved > STARVED_SHARE]
    for mixture in starved[:MIXTURES]:
        console.print(
            f"[yellow]warning[/] {escape(mixture.mixture)}: {mixture.starved:.0%} of the experts were sent "
            f"fewer than {STARVED_TOKENS} tokens; more calibration samples help",
            highlight=False,
        )
    if len(starved) > MIXTURES:
        console.print(f"[yellow]warning[/] … and {len(starved) - MIXTURES} more in report.json", highlight=False)


def bars(tokens: Sequence[int], width: int) -> str:
    """One bar for each expert, or for some neighbours together where there are more than `width`."""
    step = -(-len(tokens) // width)
    sums = [sum(tokens[start : start + step]) for start in range(0, len(tokens), step)]
    return "".join(BARS[-(-8 * value // max(1, *sums))] for value in sums)


def print_warnings(console: Console, warnings: Iterable[str]) -> None:
    """A line for each sentence, which names what is lost or doubtful."""
    for sentence in warnings:
        console.print(f"[yellow]warning[/] {escape(sentence)}", highlight=False)


def print_kept(console: Console, event: RunStarted) -> None:
    """A line on the folder that what calibration learns is kept in, or read from, where there is one."""
    if event.kept:
        console.print(event.kept, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds, or minutes where they are many, in words."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def counted(names: Sequence[str]) -> str:
    """The number of layers, and the first of them."""
    count = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    return f"{count}, {', '.join(names[:3])}{' …' if len(names) > 3 else ''}"


def print_summary(console: Console, folder: Path) -> None:
    """Print the figures of a run from its `report.json`."""
    report = read_report(folder)
    totals = report.totals
    worst = max(report.layers, key=lambda layer: layer.error)
    table = Table.grid(padding=(0, 2))
    table.add_row("layers", f"{totals.layers}, {totals.weights:,} weights")
    table.add_row("bits per weight", f"{totals.bits_per_weight:.3f}, scales and offsets included")
    table.add_row(
        "weighted error before tuning" if report.tuned else "weighted error",
        f"{totals.mean_error:.4f} on average ({totals.mean_minmax_error:.4f} for "
        f"min-max rounding), {worst.error:.4f} at worst in {escape(worst.name)}",
    )
    if totals.certificate:
        gaps = totals.certificate
        certified = [(layer.certificate.gap, layer.name) for layer in report.layers if layer.certificate]
        _, farthest = max(certified, key=lambda layer: layer[0])
        table.add_row(
            "optimality",
            f"within {gaps.mean_gap:.2%} of the global optimum on average, {gaps.worst_gap:.2%} at "
            f"worst in {escape(farthest)}, measured on {gaps.groups:,} groups",
        )
    if report.tuned:
        table.add_row("tuned", str(report.tuned))
    if report.judgement:
        table.add_row("beside the original", str(report.judgement))
        if sentence := report.judgement.continuation:
            table.add_row("original", escape(f"{sentence.prompt} … {sentence.original}"))
            table.add_row("quantized", escape(f"{sentence.prompt} … {sentence.quantized}"))
    if report.calibration != "done":
        table.add_row("calibration", f"{report.calibration}, from what an earlier run kept")
    table.add_row("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in report.seconds.items()))
    table.add_row(
        "size on disk", f"{totals.bytes_on_disk / 1e6:.1f} MB, {totals.bits_per_parameter:.3f} bits per parameter"
    )
    console.print(table)
    if report.judgement and report.judgement.warning:
        print_warnings(console, [report.judgement.warning])
    for selection in report.chosen:
        console.print(f"[bold]chosen[/] {escape(f'{selection.what}: {counted(selection.layers)}')}", highlight=False)
    _print_mixtures(console, totals.mixtures)
    fallbacks = [f"{layer.name}: {note}" for layer in report.layers for note in layer.fallbacks]
    for note in fallbacks[:5]:
        console.print(f"[yellow]note[/] {escape(note)}")
    if len(fallbacks) > 5:
        console.print(f"[yellow]note[/] … and {len(fallbacks) - 5} more in report.json")
    console.print(f"the result is in [bold]{escape(str(folder))}[/]")
    if (folder / PAGE).is_file():
        console.print(f"its page, for any browser: {escape(str(folder / PAGE))}", highlight=False)
