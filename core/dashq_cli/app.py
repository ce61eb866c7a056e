"""The commands of `dashq`, and the options that stand before them."""

import importlib.metadata
from typing import Annotated

import typer

from dashq_cli import (
    analyze,
    chat,
    compare,
    evaluate,
    formats,
    init,
    plan,
    plugins,
    quantize,
    report,
    schema,
    sweep,
    tune,
)

app = typer.Typer(
    help="Quantize the weights of large language models to 2, 3 and 4 bits, as a recipe says.",
    no_args_is_help=True,
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


app.command("init")(init.init)
app.command("run")(quantize.run)
app.command("plan")(plan.plan)
app.command("sweep")(sweep.sweep)
app.command("analyze")(analyze.analyze)
app.command("eval")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("tune")(tune.tune)
app.command("convert")(formats.convert)
app.command("verify")(formats.verify)
app.command("formats")(formats.formats)
app.command("schema")(schema.schema)
app.add_typer(plugins.app, name="plugins")
