"""The command line: `dashq run | plan | analyze | eval | convert | verify | formats | plugins`.

A package of its own, so that `dashq --help` answers at once: commands import torch and the rest when they are called.
"""

import atexit
import gc
import importlib.metadata
import sys
from typing import Annotated

import typer

from dashq_cli import analyze, evaluate, formats, plugins, quantize
from dashq_cli.failures import explain

app = typer.Typer(
    help="Quantize the weights of large language models to 2, 3 and 4 bits, as a recipe says.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dashq {importlib.metadata.version('dashq')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options that stand before a command."""


app.command("run")(quantize.run)
app.command("plan")(quantize.plan)
app.command("analyze")(analyze.analyze)
app.command("eval")(evaluate.evaluate)
app.command("convert")(formats.convert)
app.command("verify")(formats.verify)
app.command("formats")(formats.formats)
app.add_typer(plugins.app, name="plugins")


def main() -> None:
    """Exit with 0 on success, 2 where the user can mend it, 1 on a failure of ours."""
    atexit.register(gc.freeze)  # Python would look through every object of torch once more before it ends
    try:
        app()
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(f"dashq: {message}", file=sys.stderr)
        sys.exit(2)
