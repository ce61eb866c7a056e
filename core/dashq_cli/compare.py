"""`dashq compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dashq_cli.imports import starting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dashq.results.comparison import Rows

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
    from dashq.registry import load_registry
    from dashq.results.comparison import judged_alike, read_finished, sections
    from dashq_cli.progress import print_warnings

    results, console = read_finished(folders), Console()
    tables = sections(results, load_registry().serializers, worst)
    beside = max(1, (console.width - LABEL) // (CELL + 2))
    for start in range(0, len(results), beside):
        if start:
            console.print()
        columns = slice(start, start + beside)
        console.print(_table([result.name for result in results[columns]], tables, columns))
    if not judged_alike(results):
        print_warnings(console, ["these were judged on different texts: `dashq eval` measures all of them on one"])


def _table(names: "Sequence[str]", tables: "Mapping[str, Rows]", columns: slice) -> Table:
    """All sections of the comparison, for the results of these names, which fit beside each other."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", overflow="fold")
    for name in names:
        table.add_column(escape(name), justify="right", overflow="fold", vertical="bottom")
    for number, (title, rows) in enumerate(tables.items()):
        if number:
            table.add_row()
        table.add_row(f"[bold]{title}[/]")
        for name, values in rows.items():
            table.add_row(escape(name), *map(escape, values[columns]))
    return table
