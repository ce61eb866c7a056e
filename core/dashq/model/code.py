"""The code that a model brings along: the files that its configurations name, and all that these import."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dashq.errors import CheckpointError
from dashq.model.location import Location, own_files
from dashq.model.mappings import mapping_or_empty

CLASS = re.compile(r"([\w.]+)\.\w+")  # in an `auto_map`
OTHERS_CLASS = re.compile(r"(.+)--.+")  # the same, after the name of another repository of the hub
GENERATION = "custom_generate"  # a folder with a way to generate of the model's own


def code_files(location: Location) -> list[Path]:
    """The files of code beside the weights that transformers may run, where it is trusted, in order of their names.

    Raises a `CheckpointError` for code that cannot be parsed.
    """
    own = {path for pattern in ("*.py", "*/*.py") for path in own_files(location.folder, pattern)}
    modules = [match[1] for reference in _references(location) if (match := CLASS.fullmatch(reference))]
    waiting = {location.folder.joinpath(*name.split(".")).with_suffix(".py") for name in modules} & own
    waiting |= {path for path in own if path.parent == location.folder / GENERATION}
    files: set[Path] = set()
    while waiting:
        path = waiting.pop()
        files.add(path)
        waiting |= (set(_relative_imports(path)) & own) - files
    return sorted(files)


def refuse_foreign_code(location: Location) -> None:
    """Raise a `CheckpointError` for code that does not lie beside the weights: it would be fetched, and not carried."""
    for reference in _references(location):
        if match := OTHERS_CLASS.fullmatch(reference):
            raise CheckpointError(
                f"{location} names code of another repository, {match[1]}: put its files beside the weights, and take "
                f"`{match[1]}--` out of `auto_map` in the configurations there"
            )


def _references(location: Location) -> Iterator[str]:
    """The classes in the `auto_map` of any configuration that lies beside the weights."""
    for path in own_files(location.folder, "*config.json"):
        # Of a broken file nothing is said here: whoever needs it says what is wrong with it.
        yield from _classes(mapping_or_empty(path).get("auto_map"))


def _classes(entry: Any) -> Iterator[str]:
    """The strings in an `auto_map`, whose values are strings or, for tokenizers, lists."""
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, dict | list):
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from _classes(value)


def _relative_imports(path: Path) -> Iterator[Path]:
    """The files that a file of code may import from beside it."""
    try:
        module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}, code of the model, cannot be parsed: {error}") from error
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and 0 < node.level <= len(path.parents):
            folder = path.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                target = folder.joinpath(*name.split("."))
                yield target.with_suffix(".py")
                yield target / "__init__.py"
