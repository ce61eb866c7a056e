"""`dashq plugins`: what is installed, whether it keeps its contract, and how to begin one."""

import importlib.metadata
import re
from enum import StrEnum, auto
from pathlib import Path
from string import Template
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dashq_cli.imports import starting

app = typer.Typer(help="List the installed strategies, check them, or begin a plugin.", no_args_is_help=True)

TEMPLATES = Path(__file__).parent / "templates"


class Kind(StrEnum):
    """The kinds of strategies that a plugin can bring."""

    ESTIMATOR = auto()
    SOLVER = auto()
    GROUPER = auto()
    ROUTER = auto()
    SERIALIZER = auto()
    TUNER = auto()


@app.command("list")
@starting()
def list_strategies() -> None:
    """Show every installed strategy, its parameters and its module."""
    from dashq.registry import load_registry
    from dashq.strategies import KINDS

    console = Console(markup=False)  # brackets in a docstring are shapes
    registry = load_registry()
    for kind in KINDS:
        table = Table(kind, "", box=None, header_style="bold", pad_edge=False)
        table.columns[0].no_wrap = True
        for name, cls in getattr(registry, kind).items():
            parameters = (
                key if field.is_required() else f"{key}={field.get_default(call_default_factory=True)}"
                for key, field in cls.model_fields.items()
            )
            summary = (cls.__doc__ or "").strip().split("\n")[0]
            table.add_row(escape(name), escape(summary))
            table.add_row("", Text(" · ".join([cls.__module__, *parameters]), style="dim"))
        console.print(table)


@app.command()
def check(
    names: Annotated[list[str], typer.Argument(metavar="[NAME]", help="Strategies; all, if none is named.")] = [],  # noqa: B006 - typer wants a list
) -> None:
    """Hold strategies, with their defaults, against the contract of their kind.

    Exits with 1 if one fails.
    """
    from dashq.errors import MissingPackageError, UsageError, one_line
    from dashq.registry import load_registry
    from dashq.strategies import KINDS
    from dashq.strict import guess

    try:
        from dashq.testing import check_strategy
    except ModuleNotFoundError as error:
        raise MissingPackageError(f"checking plugins needs {error.name}: pip install 'dashq[testing]'") from error
    registry = load_registry()
    installed = [(kind.removesuffix("s"), cls) for kind in KINDS for cls in getattr(registry, kind).values()]
    known = sorted({cls.name for _, cls in installed})
    for name in names:
        if name not in known:
            raise UsageError(
                f"no strategy named {name!r}.{guess(name, known)} Installed: {', '.join(known)}. A plugin of your own "
                f"has to be installed first: pip install -e dashq-{name}"
            )
    failed = False
    for kind, cls in installed:
        if not names or cls.name in names:
            try:
                check_strategy(cls)
                claims = "".join(f", {claim.replace('_', ' ')}" for claim in getattr(cls, "claims", ()))
                typer.echo(f"ok    {kind} {cls.name}{claims}")
            except AssertionError as error:
                failed = True
                typer.echo(f"FAIL  {one_line(error)}")
    if failed:
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The strategy's name in recipes.")],
    kind: Annotated[Kind, typer.Option(help="The kind of the strategy.")],
    folder: Annotated[Path, typer.Option(help="Where to put the plugin's folder.")] = Path(),
) -> None:
    """Write a complete plugin to start from, with an example that works.

    The folder dashq-NAME then holds a package, a test and a README.
    """
    from dashq.errors import OutputError, UsageError

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise UsageError(
            f"{name!r} cannot name a plugin: it takes lower-case letters, digits and single underscores, "
            "beginning with a letter, as in my_solver"
        )
    names = {entry.name for entry in importlib.metadata.entry_points(group="dashq")}
    if name in names:
        taken = ", ".join(sorted(names))
        raise UsageError(f"{name!r} is the name of an installed plugin; choose another than {taken}")
    target = folder / f"dashq-{name}"
    if target.exists():
        raise OutputError(f"{target.absolute()} exists already; choose another name, or another --folder")
    target.mkdir(parents=True)
    for file, text in plugin_files(name, kind).items():
        (target / file).write_text(text, encoding="utf-8")
    typer.echo(f"{target} is ready: pip install -e {target}, then dashq plugins check {name}")


def plugin_files(name: str, kind: Kind) -> dict[str, str]:
    """The files of a plugin to start from, by their names: a package with one strategy, its test and a README."""
    words = {"name": name, "kind": kind, "class_name": "".join(map(str.capitalize, [*name.split("_"), kind]))}
    templates = {
        "pyproject.toml": "pyproject.toml.txt",
        f"dashq_{name}.py": f"{kind}.py.txt",
        "test_contract.py": "test_contract.py.txt",
        "README.md": "README.md.txt",
    }
    return {
        file: Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(words)
        for file, template in templates.items()
    }
