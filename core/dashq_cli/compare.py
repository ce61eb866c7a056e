"""`dashq compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dashq_cli.imports import starting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dashq.results.comparison import Finished

Results = Annotated[list[Path], typer.Argument(metavar="OUT...", help="The folders of results.", show_default=False)]
LABEL, CELL = 26, 16  # least columns of the terminal for a row's name and for one result


@starting()
def compare(
    folders: Results,
    worst: Annotated[int, typer.Option(min=0, help="So many of the layers that are worst in any result.")] = 5,
) -> None:
    """Show results side by side.

    Recipes where they differ, sizes, figures of predictions, errors, seconds
    and the worst layers, all from the reports that runs wrote beside their
    results. `dashq eval` measures anew, on any text.
    """
    from dashq.results.comparison import judged_alike, read_finished
    from dashq_cli.progress import print_warnings

    results, console = read_finished(folders), Console()
    beside = max(1, (console.width - LABEL) // (CELL + 2))
    for start in range(0, len(results), beside):
        if start:
            console.print()
        console.print(_table(results, slice(start, start + beside), worst))
    if not judged_alike(results):
        print_warnings(console, ["these were judged on different texts: `dashq eval` measures all of them on one"])


def _table(results: "Sequence[Finished]", columns: slice, worst: int) -> Table:
    """All sections of the comparison, for the results that fit beside each other."""
    from dashq.results.comparison import sections

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for result in results[columns]:
        table.add_column(escape(result.name), justify="right", overflow="fold", vertical="bottom")
    for number, (title, rows) in enumerate(sections(results, worst).items()):
        if number:
            table.add_row()
        table.add_row(f"[bold]{title}[/]")
        for name, values in rows.items():
            table.add_row(escape(name), *map(escape, values[columns]))
    return table
