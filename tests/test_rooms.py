"""The shape of the house: the core knows no plugin, modules and functions are small, each module says what it is."""

import ast
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from recipes import REGISTRY

ROOT = Path(__file__).parents[2]
CORE = {path: ast.parse(path.read_text()) for path in sorted(ROOT.glob("core/**/*.py"))}
PLUGINS = {path: ast.parse(path.read_text()) for path in sorted(ROOT.glob("plugins/**/*.py"))}


def imports(module: ast.Module) -> Iterator[str]:
    """The top-level packages that a module imports, wherever it does."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_the_modules_are_found() -> None:
    assert {"pipeline.py", "registry.py", "quantize.py"} <= {path.name for path in CORE}
    assert {"irls.py", "native.py"} <= {path.name for path in PLUGINS}


def test_the_core_imports_no_plugin() -> None:
    assert not [path for path, module in CORE.items() if "dashq_plugins" in imports(module)]


def test_the_core_names_no_strategy() -> None:
    strategies = {name for kind in vars(REGISTRY).values() for name in kind} - {"dashq"}  # the project's name as well
    literals = {
        path: {node.value for node in ast.walk(module) if isinstance(node, ast.Constant)}
        for path, module in CORE.items()
    }
    assert not {path: names & strategies for path, names in literals.items() if names & strategies}


def test_default_plugins_know_nothing_of_each_other() -> None:
    shared = {f"dashq_plugins.{path.stem}" for path in PLUGINS if path.stem.startswith("_")}
    assert not [path for path, module in PLUGINS.items() if "dashq_cli" in imports(module)]
    for path, module in PLUGINS.items():
        froms = {node.module or "" for node in ast.walk(module) if isinstance(node, ast.ImportFrom)}
        assert {name for name in froms if name.startswith("dashq_plugins")} <= shared, path


def test_every_default_plugin_is_one_module_with_an_entry_point() -> None:
    entries = importlib.metadata.distribution("dashq").entry_points.select(group="dashq")
    modules = {f"dashq_plugins.{path.stem}" for path in PLUGINS if not path.stem.startswith("_")}
    assert {entry.value for entry in entries} == modules


def test_every_module_opens_with_one_sentence() -> None:
    openings = {
        path: (ast.get_docstring(module) or "").split("\n\n")[0].replace("\n", " ")
        for path, module in (CORE | PLUGINS).items()
    }
    assert not {path: text for path, text in openings.items() if not text.endswith(".") or ". " in text or "? " in text}


def test_modules_and_functions_stay_small() -> None:
    everything = CORE | PLUGINS
    lengths = {path: len(path.read_text().splitlines()) for path in everything}
    assert not {path: length for path, length in lengths.items() if length > 300}
    functions = {
        f"{path}:{node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for path, module in everything.items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
    }
    assert not {place: length for place, length in functions.items() if length > 50}
