"""The command line: `dashq run | plan | analyze | eval | convert | verify | formats | plugins`.

A package of its own, so that `dashq --help` answers at once: importing `dashq` imports torch and transformers.
"""

import sys

import typer

from dashq_cli import analyze, evaluate, formats, plugins, quantize

app = typer.Typer(
    help="Quantize the weights of large language models to 2, 3 and 4 bits, as a recipe says.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
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
    try:
        app()
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        print(f"dashq: {error}", file=sys.stderr)
        sys.exit(2)


def _is_for_the_user(error: Exception) -> bool:
    errors = sys.modules.get("dashq.errors")  # not imported: then the error cannot be one of ours
    return errors is not None and isinstance(error, errors.DashqError)
