"""Write the pages and tables that come from code and results; with `--check`, only name those that are stale."""

import ast
import importlib.metadata
import inspect
import json
import re
import sys
import textwrap
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer.main
import yaml
from pydantic.fields import FieldInfo
from typer.cli import get_docs_for_click

import measured_tables
import results_page
import target_recipes
from dashq import Container, Coupled, Curvature, Opened, Program, Target, Wish, hooks, load_registry, testing
from dashq.recipe.schema import recipe_schema
from dashq.registry import path_of
from dashq.strategies import KINDS, Solver, Strategy
from dashq_cli.app import app
from dashq_cli.plugins import Kind, plugin_files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PACKAGES = ("core/dashq", "core/dashq_cli", "plugins/dashq_plugins")
NOTE = "<!-- Written by docs/generate.py from the code; edit the docstrings there. -->"
REGION = re.compile(r"(?P<begin><!-- generated: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
MEMBERS = (FunctionType, property, classmethod, staticmethod)
# The names of the plugins that the page of hooks shows whole, by kind.
EXAMPLES = {
    "estimators": "clipped",
    "solvers": "narrowed",
    "groupers": "by_importance",
    "routers": "softened",
    "serializers": "byte_codes",
    "tuners": "norms",
}
WIDTH = 80  # characters of code that a page shows without scrolling
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def main() -> None:
    """Write the pages, or with `--check` exit with 1 and name those that differ from what would be written."""
    pages = {
        DOCS / "hooks.md": hooks_page(),
        DOCS / "cli.md": cli_page(),
        DOCS / "results.md": results_page.results_page("<!-- Written by docs/generate.py from bench/results. -->"),
    }
    pages |= target_recipes.target_recipes(ROOT / "recipes")
    pages[ROOT / "recipes" / "schema.json"] = schema_file()
    others = [path for path in (*DOCS.rglob("*.md"), DOCS.parent / "README.md") if path.exists() and path not in pages]
    pages |= {path: filled(path.read_text("utf-8")) for path in others}
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text("utf-8") != text]
    if sys.argv[1:] == ["--check"]:
        sys.exit(f"stale: {', '.join(map(str, stale))}; run `python docs/generate.py`" if stale else 0)
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages[path], "utf-8")


def filled(page: str) -> str:
    """A page with its tables between `<!-- generated: NAME -->` and `<!-- end -->` as they should be."""
    return REGION.sub(lambda found: f"{found['begin']}\n{TABLES[found['name']]()}\n\n{found['end']}", page)


def schema_file() -> str:
    """The schema of the recipes that come with dashq."""
    own: dict[str, Any] = {kind: own_strategies(kind) for kind in KINDS}
    return json.dumps(recipe_schema(replace(load_registry(), **own)), indent=1) + "\n"


def hooks_page() -> str:
    """Every hook with its interface and the strategies that come with dashq."""
    return _page(
        "# Hooks and strategies",
        NOTE,
        "There are six hooks, one for each kind of strategy. A hook takes no arguments and returns classes; a seventh, "
        "[`dashq_programs`](#dashq_programs), returns programs that open a format, and an eighth, "
        "[`dashq_targets`](#dashq_targets), programs that recipes can be made for. Each "
        "class derives from the kind's interface. Its `name` is how recipes ask for it, and its fields are its "
        "parameters in a recipe. [Write a plugin](write-a-plugin.md) goes through one from the start, and the "
        "[gallery](gallery.md) has three more with what they do to a real model. The "
        "[values](api.md#the-values) that the methods take and return have a page of their own.",
        "Methods marked *required* have to be there; everything else has a default.",
        *(part for kind in KINDS for part in _kind(kind)),
        "## `dashq_programs`",
        _doc(hooks.dashq_programs),
        _code(_signature(hooks.dashq_programs)),
        *(part for value in (Program, Opened) for part in (f"### `{value.__name__}`", *_interface(value))),
        "## `dashq_targets`",
        _doc(hooks.dashq_targets),
        _code(_signature(hooks.dashq_targets)),
        *(part for value in (Target, Wish) for part in (f"### `{value.__name__}`", *_interface(value))),
        "## Files of one format",
        "A serializer whose programs want a model in one file gives a `Container` for it, from `Serializer.container`.",
        *_interface(Container),
        "## A curvature of your own",
        "An estimator may produce a class of its own in place of `Diagonal` or `Full`. One that knows what lies off "
        "the diagonal derives from `Coupled`.",
        *(part for value in (Curvature, Coupled) for part in (f"### `{value.__name__}`", *_interface(value))),
    )


def _kind(kind: str) -> Iterator[str]:
    hook, interface = getattr(hooks, f"dashq_{kind}"), KINDS[kind]
    yield f"## `{hook.__name__}`"
    yield _doc(hook)
    yield _code(_signature(hook))
    yield f"### The interface `{interface.__name__}`"
    yield from _interface(interface)
    check = getattr(testing, f"check_{kind.removesuffix('s')}")
    yield "#### The contract"
    yield f"{_doc(check)}\n\n`dashq.testing.{check.__name__}` and `dashq plugins check` test this."
    name, one = EXAMPLES[kind], kind.removesuffix("s")
    yield "#### A whole plugin"
    yield f"`dashq plugins new {name} --kind {one}` writes this module, with a package, a test and a README around it:"
    yield _code(plugin_files(name, Kind(one))[f"dashq_{name}.py"].rstrip("\n"))
    for name, strategy in own_strategies(kind).items():
        yield f"### `{name}`"
        yield from _strategy(strategy)


def _interface(interface: type) -> Iterator[str]:
    """All that an author may write: class attributes, required methods, and those with a default."""
    yield _doc(interface)
    attributes = list(_class_attributes(interface))
    if attributes:
        yield _code("\n".join(declaration for _, declaration, _ in attributes))
    for name, _, text in attributes:
        if text:
            yield f"`{name}`: {text}"
    abstract = interface.__abstractmethods__ if isinstance(interface, ABCMeta) else frozenset()
    required = [name for name in _members(interface) if name in abstract]
    for name in [*required, *(name for name in _members(interface) if name not in required)]:
        yield f"#### `{interface.__name__}.{name}`"
        function = _function(vars(interface)[name])
        yield _code(_signature(function))
        yield f"{'*Required.* ' if name in required else ''}{_doc(function)}"


def _members(interface: type) -> list[str]:
    """The public methods and properties that a class defines, in the order of the source."""
    members = vars(interface).items()
    return [name for name, member in members if not name.startswith("_") and isinstance(member, MEMBERS)]


def _function(member: Any) -> Any:
    return member.fget if isinstance(member, property) else inspect.unwrap(getattr(member, "__func__", member))


def _strategy(strategy: type[Strategy]) -> Iterator[str]:
    yield _doc(strategy)
    yield f"`{path_of(strategy)}`"
    if issubclass(strategy, Solver) and strategy.claims:
        yield f"It claims {', '.join(f'`{claim}`' for claim in strategy.claims)}."
    rows = [(f"`{name}`", _type(field), _default(field)) for name, field in strategy.model_fields.items()]
    yield _table(("parameter", "type", "default"), rows) if rows else "No parameters."


def cli_page() -> str:
    """Every command with its arguments and options, from their help texts."""
    command = typer.main.get_command(app)
    commands = get_docs_for_click(obj=command, ctx=typer.Context(command), name="dashq", title="Command line")
    exit_codes = [
        ("0", "success"),
        ("1", "a failure of dashq, with a traceback; a broken contract in `plugins check`"),
        ("2", "something to mend: command line, recipe, model, text, folder or plugin. A message says what and how"),
        ("130", "interrupted with Ctrl-C or SIGTERM"),
    ]
    return _page(NOTE, commands.strip(), "## Exit codes", _table(("code", "meaning"), exit_codes))


def module_table() -> str:
    """Every module by room, with its first sentence."""
    return "\n\n".join(part for package in PACKAGES for folder in _rooms(ROOT / package) for part in _room(folder))


def _rooms(package: Path) -> Iterator[Path]:
    yield package
    yield from sorted(path.parent for path in package.rglob("__init__.py") if path.parent != package)


def _room(folder: Path) -> Iterator[str]:
    modules = sorted(path for path in folder.glob("*.py") if path.stem != "__init__")
    name = ".".join(folder.relative_to(ROOT).parts[1:])
    sentence = _first_sentence(folder / "__init__.py")
    yield f"**`{name}`**" + (f": {sentence[0].lower()}{sentence[1:]}" if sentence else "")
    if modules:
        yield _table(("module", "content"), [(f"`{path.stem}`", _first_sentence(path)) for path in modules])


def _first_sentence(path: Path) -> str:
    """The first paragraph of a module's docstring, which is one sentence."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def kind_table() -> str:
    """The six questions with the strategies that answer them."""
    questions = {
        "estimators": "What do a layer's inputs tell about its weights?",
        "routers": "How much does a token count for an expert?",
        "groupers": "Which columns share a scale?",
        "solvers": "Which codes, scales and offsets?",
        "serializers": "How does it lie in a file, and what can the file hold?",
        "tuners": "How do scales, offsets and norms learn from the original model?",
    }
    rows = [
        (str(number), kind.removesuffix("s"), question, ", ".join(f"`{name}`" for name in own_strategies(kind)))
        for number, (kind, question) in enumerate(questions.items(), start=1)
    ]
    return _table(("", "kind", "question", "answers that come with dashq"), rows)


def strategy_table(kind: str) -> str:
    """The strategies of one kind with the first sentences of their docstrings."""
    rows = [
        (f"[`{name}`](hooks.md#{name})", _doc(cls).split("\n\n")[0].replace("\n", " "))
        for name, cls in own_strategies(kind).items()
    ]
    return _table((kind.removesuffix("s"), ""), [(name, text.replace("|", "\\|")) for name, text in rows])


def decision_table() -> str:
    """The decisions by number, each with its title."""
    rows = []
    for path in sorted((ROOT / "docs" / "decisions").glob("0*.md")):
        title = path.read_text("utf-8").partition("\n")[0].lstrip("# ")
        rows.append((f"[{path.stem[:4]}]({path.name})", title.partition(" ")[2]))
    return _table(("", "decision"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "headline": results_page.headline,
    "modules": module_table,
    "kinds": kind_table,
    "decisions": decision_table,
    "targets": target_recipes.target_table,
    **{
        measured.__name__: measured
        for measured in (
            measured_tables.budgets,
            measured_tables.critical,
            measured_tables.gallery,
            measured_tables.gallery_runs,
            measured_tables.hybrid_budgets,
            measured_tables.levels,
            measured_tables.more_bits,
            measured_tables.super_blocks,
            measured_tables.tuned,
        )
    },
    **{kind: partial(strategy_table, kind) for kind in KINDS},
}


def own_strategies(kind: str) -> dict[str, type[Strategy]]:
    """The strategies of a kind that dashq itself brings: others may be installed where this runs."""
    entries = importlib.metadata.distribution("dashq").entry_points
    modules = {entry.module for entry in entries if entry.group == hooks.PROJECT}
    return {name: cls for name, cls in getattr(load_registry(), kind).items() if cls.__module__ in modules}


def _signature(function: Any) -> str:
    """A function's head with the annotations as the source spells them, one parameter a line where it is long."""
    source = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    assert node.returns
    parameters = [ast.get_source_segment(source, parameter) or "" for parameter in node.args.args]
    result = ast.get_source_segment(source, node.returns)
    kinds = {"property", "classmethod", "staticmethod"}
    marks = [f"@{mark}\n" for mark in map(ast.unparse, node.decorator_list) if mark in kinds]
    line = f"def {node.name}({', '.join(parameters)}) -> {result}"
    if len(line) > WIDTH:
        line = "\n".join([f"def {node.name}(", *(f"    {parameter}," for parameter in parameters), f") -> {result}"])
    return "".join(marks) + line


def _class_attributes(interface: type) -> Iterator[tuple[str, str, str]]:
    """Name, declaration and docstring of every class attribute of an interface."""
    source = textwrap.dedent(inspect.getsource(interface))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.ClassDef)
    for item, below in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            text = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                text = inspect.cleandoc(str(below.value.value))
            yield item.target.id, ast.get_source_segment(source, item) or "", text


def _type(field: FieldInfo) -> str:
    limits = ((BOUNDS[key], getattr(limit, key, None)) for limit in field.metadata for key in BOUNDS)
    return ", ".join([_words(field.annotation), *(f"{sign} {value:g}" for sign, value in limits if value is not None)])


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{_yaml(field.default)}`"


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _words(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return f"list of {_words(get_args(annotation)[0])}"
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
