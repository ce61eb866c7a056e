"""`dashq report`."""

from pathlib import Path
from typing import Annotated

import typer

from dashq_cli.compare import Results
from dashq_cli.imports import starting

COMPARISON = "comparison.html"


@starting()
def report(
    folders: Results,
    output: Annotated[
        Path | None,
        typer.Option(help=f"The file to write; report.html in OUT if not given, of several {COMPARISON} here."),
    ] = None,
) -> None:
    """Write a page of results for any browser.

    Every run writes one as report.html beside its result, with its figures and
    maps of its layers. Several results in one page become a comparison. The
    page is one file and loads nothing from elsewhere.
    """
    from dashq.registry import load_registry
    from dashq.results.comparison import read_finished
    from dashq.results.folder import PAGE
    from dashq.results.page import page, write_page

    results = read_finished(folders)
    usual = folders[0] / PAGE if len(folders) == 1 else Path(COMPARISON)
    path = write_page(output or usual, page(results, load_registry().serializers))
    typer.echo(f"the page is {path}")
