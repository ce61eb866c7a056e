"""The tables of `dashq sweep`: its plan, and the comparison of its results, on the terminal and in files."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dashq.data import average_bits
from dashq.recipe.plan import LayerPlan
from dashq.recipe.variations import in_words
from dashq.results.files import write_json, write_text
from dashq.results.report import read_report
from dashq_cli.members import Member, Members
from dashq_cli.plan_table import size

UNKNOWN = "–"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A member's result in figures: its size, time and calibration, and its judgement beside the original model."""

    member: str
    values: Mapping[str, Any]
    folder: str
    bits_per_weight: float
    bytes_on_disk: int
    seconds: float
    calibration: str
    mean_error: float
    divergence: float | None = None
    agreement: float | None = None
    perplexity: float | None = None
    original_perplexity: float | None = None

    @classmethod
    def of(cls, member: Member) -> "Figures":
        """The figures in the report of a finished member."""
        report = read_report(member.recipe.output)
        judged = report.judgement
        return cls(
            member=member.variation.name,
            values=member.variation.values,
            folder=member.recipe.output.name,
            bits_per_weight=report.totals.bits_per_weight,
            bytes_on_disk=report.totals.bytes_on_disk,
            seconds=round(sum(report.seconds.values()), 1),
            calibration=report.calibration,
            mean_error=report.totals.mean_error,
            divergence=judged.divergence if judged else None,
            agreement=judged.agreement if judged else None,
            perplexity=judged.perplexity if judged else None,
            original_perplexity=judged.original_perplexity if judged else None,
        )

    @property
    def row(self) -> dict[str, Any]:
        """The figures with each varied entry as one of them, by its key."""
        figures = {key: value for key, value in vars(self).items() if key != "values"}
        return {"member": figures.pop("member"), **self.values, **figures}


def plan_of_members(members: Members, plans: Sequence[Sequence[LayerPlan]]) -> Table:
    """A row for each member: what it varies, how large it will be, and whether it is there."""
    table = _table(members.own)
    for heading in ("bits/weight", "size", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for member, layers in zip(members, plans, strict=True):
        total, budget = sum(plan.bytes for plan in layers), member.recipe.budget
        average = (
            f"≤ {budget.bits_per_weight:g}"
            if budget
            else f"{average_bits((plan.layer, plan.bytes) for plan in layers):.3f}"
        )
        state = "finished" if member.is_done else ""
        table.add_row(str(member.number), *_values(member), average, UNKNOWN if budget else size(total), state)
    return table


def print_comparison(console: Console, members: Sequence[Member]) -> None:
    """Print a row for each result: what it varies, and its figures."""
    every = [Figures.of(member) for member in members]
    table = _table(members)
    for heading in ("bits/weight", "size", "seconds", "divergence", "agreement", "perplexity"):
        table.add_column(heading, justify="right")
    for member, figures in zip(members, every, strict=True):
        table.add_row(
            str(member.number),
            *_values(member),
            f"{figures.bits_per_weight:.3f}",
            size(figures.bytes_on_disk),
            f"{figures.seconds:.0f}",
            UNKNOWN if figures.divergence is None else f"{figures.divergence:.4f}",
            UNKNOWN if figures.agreement is None else f"{figures.agreement:.1%}",
            UNKNOWN if figures.perplexity is None else f"{figures.perplexity:,.2f}",
        )
    console.print(table)
    if every[0].original_perplexity is not None:
        console.print(f"perplexity of the original: {every[0].original_perplexity:,.2f}", highlight=False)


def write_comparison(folder: Path, members: Sequence[Member], plot: str) -> list[str]:
    """Write the figures of finished members as JSON, as a table and as a picture; returns the files' names.

    There is no picture where matplotlib is not installed, nor of members that were not judged.
    """
    if not members:
        return []
    every = [Figures.of(member) for member in members]
    write_json(folder / "sweep.json", {"members": [figures.row for figures in every]})
    table = io.StringIO()
    writer = csv.DictWriter(table, list(every[0].row), lineterminator="\n")
    writer.writeheader()
    for figures in every:
        values = {key: in_words(value) for key, value in figures.values.items()}
        writer.writerow({**figures.row, **values})
    write_text(folder / "sweep.csv", table.getvalue())
    judged = [figures for figures in every if figures.divergence is not None]
    if not judged:
        return ["sweep.json", "sweep.csv"]
    try:
        from dashq_cli import charts
    except ImportError:
        return ["sweep.json", "sweep.csv", "no figure, which needs matplotlib: pip install 'dashq[plot]'"]
    points = [(figures.member, figures.bytes_on_disk, figures.divergence or 0.0) for figures in judged]
    charts.save(charts.quality(points), folder / f"sweep.{plot}")
    return ["sweep.json", "sweep.csv", f"sweep.{plot}"]


def _table(members: Sequence[Member]) -> Table:
    """A table with a column for numbers, and one for each entry that is varied."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", justify="right")
    for key in members[0].variation.values:
        table.add_column(escape(key), overflow="fold")
    return table


def _values(member: Member) -> list[str]:
    return [escape(in_words(value)) for value in member.variation.values.values()]
