"""Write docs/hooks.md and docs/cli.md from the code: `python docs/generate.py`; `--check` only names stale pages."""

import ast
import importlib.metadata
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main
import yaml
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

from dashq import Container, Opened, Program, hooks, load_registry, testing
from dashq.registry import path_of
from dashq.strategies import KINDS, Strategy
from dashq_cli import app

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py from the code; edit the docstrings there. -->"
WIDTH = 80  # characters of code that a page shows without scrolling
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def main() -> None:
    """Write the pages, or with `--check` exit with 1 and name those that differ from what would be written."""
    pages = {DOCS / "hooks.md": hooks_page(), DOCS / "cli.md": cli_page()}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text("utf-8") != text]
    if sys.argv[1:] == ["--check"]:
        sys.exit(f"stale: {', '.join(map(str, stale))}; run `python docs/generate.py`" if stale else 0)
    for path in stale:
        path.write_text(pages[path], "utf-8")


def hooks_page() -> str:
    """Every hook with its interface and the strategies that come with dashq."""
    return _page(
        "# Hooks and strategies",
        NOTE,
        "There are five hooks, one for each kind of strategy. A hook takes no arguments and returns classes; a sixth, "
        "[`dashq_programs`](#dashq_programs), returns programs that open a format. Each "
        "class derives from the kind's interface. Its `name` is how recipes ask for it, and its fields are its "
        "parameters in a recipe. [Write a plugin](write-a-plugin.md) goes through one from the start. The "
        "[values](api.md#the-values) that the methods take and return have a page of their own.",
        *(part for kind in KINDS for part in _kind(kind)),
        "## `dashq_programs`",
        _doc(hooks.dashq_programs),
        _code(_signature(hooks.dashq_programs)),
        "### `Program`",
        _doc(Program),
        "### `Opened`",
        _doc(Opened),
        "## Files of one format",
        "A serializer whose programs want a model in one file gives a `Container` for it, from `Serializer.container`.",
        _doc(Container),
        *(part for name in ("write", "read") for part in _container_method(name)),
    )


def _container_method(name: str) -> tuple[str, str, str]:
    method = getattr(Container, name)
    return f"#### `Container.{name}`", _code(_signature(method)), _doc(method)


def _kind(kind: str) -> Iterator[str]:
    hook, interface = getattr(hooks, f"dashq_{kind}"), KINDS[kind]
    yield f"## `{hook.__name__}`"
    yield _doc(hook)
    yield _code(_signature(hook))
    yield f"### The interface `{interface.__name__}`"
    yield _doc(interface)
    attributes = _class_attributes(interface)
    if attributes:
        yield _code("\n".join(attributes))
    for name in _abstract_methods(interface):
        method = getattr(interface, name)
        yield f"#### `{interface.__name__}.{name}`"
        yield _code(_signature(method))
        yield _doc(method)
    check = getattr(testing, f"check_{kind.removesuffix('s')}")
    yield "#### The contract"
    yield f"{_doc(check)}\n\n`dashq.testing.{check.__name__}` and `dashq plugins check` test this."
    for name, strategy in getattr(load_registry(), kind).items():
        if strategy.__module__ in _own_modules():
            yield f"### `{name}`"
            yield from _strategy(strategy)


def _strategy(strategy: type[Strategy]) -> Iterator[str]:
    yield _doc(strategy)
    yield f"`{path_of(strategy)}`"
    rows = [(f"`{name}`", _type(field), _default(field)) for name, field in strategy.model_fields.items()]
    yield _table(("parameter", "type", "default"), rows) if rows else "No parameters."


def cli_page() -> str:
    """Every command with its arguments and options, from their help texts."""
    command = typer.main.get_command(app)
    commands = get_docs_for_click(obj=command, ctx=typer.Context(command), name="dashq", title="Command line")
    exit_codes = [
        ("0", "success"),
        ("1", "a failure of dashq or of a plugin, with a traceback; a broken contract in `plugins check`"),
        ("2", "something to mend: command line, recipe, model, text, folder or plugin. A message says what and how"),
        ("130", "interrupted with Ctrl-C"),
    ]
    return _page(NOTE, commands.strip(), "## Exit codes", _table(("code", "meaning"), exit_codes))


def _own_modules() -> set[str]:
    """The plugin modules that dashq itself brings: others may be installed where this runs."""
    entries = importlib.metadata.distribution("dashq").entry_points
    return {entry.module for entry in entries if entry.group == hooks.PROJECT}


def _signature(function: Any) -> str:
    """A function's head with the annotations as the source spells them, one parameter a line where it is long."""
    source = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert node.returns
    parameters = [ast.get_source_segment(source, parameter) or "" for parameter in node.args.args]
    result = ast.get_source_segment(source, node.returns)
    line = f"def {node.name}({', '.join(parameters)}) -> {result}"
    if len(line) <= WIDTH:
        return line
    return "\n".join([f"def {node.name}(", *(f"    {parameter}," for parameter in parameters), f") -> {result}"])


def _abstract_methods(interface: type[Strategy]) -> list[str]:
    return [name for name in vars(interface) if name in interface.__abstractmethods__]


def _class_attributes(interface: type[Strategy]) -> list[str]:
    node = ast.parse(textwrap.dedent(inspect.getsource(interface))).body[0]
    assert isinstance(node, ast.ClassDef)
    return [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]


def _type(field: FieldInfo) -> str:
    limits = ((BOUNDS[key], getattr(limit, key, None)) for limit in field.metadata for key in BOUNDS)
    return ", ".join([_words(field.annotation), *(f"{sign} {value:g}" for sign, value in limits if value is not None)])


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{_yaml(field.default)}`"


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in get_args(annotation))
    if get_args(annotation):
        return " or ".join(_words(choice) for choice in get_args(annotation))
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "`null`"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value)).splitlines()[0]


def _doc(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _code(text: str, language: str = "python") -> str:
    return f"```{language}\n{text}\n```"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(*parts: str) -> str:
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
