"""YAML with line numbers, so that an error can say where it is."""

import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dashq.errors import RecipeError, cause

Keys = tuple[str | int, ...]
LARGEST = 4 * 2**20  # bytes of a recipe
MOST_VALUES = 100_000  # in it
LONGEST_NUMBER = 100  # characters


@dataclass(frozen=True)
class Document:
    """The content of a YAML file, changed by `--set` or not, and the place of each entry."""

    path: Path
    data: dict[str, Any]
    places: Mapping[Keys, str]

    def where(self, keys: Keys) -> str:
        """The place of an entry, or of the nearest one around it that stands in the file.

        `keys` count entries of a list; where one entry stands in place of a list, the number says nothing.
        """
        data: Any = self.data
        own: Keys = ()
        for key in keys:
            entries: dict[Any, Any] = dict(enumerate(data)) if isinstance(data, list) else data or {}
            if key in entries or isinstance(key, str):
                own = (*own, key)
                data = entries.get(key)
                data = data if isinstance(data, list | dict) else None
        while own not in self.places:
            own = own[:-1]
        return self.places[own]


class _Loader(yaml.SafeLoader):
    """Reads plain data, and says with its place which value is not of the type that it looks like or is marked with."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, str):
                value.encode()  # an escape can stand for half of a character
            return value
        except yaml.YAMLError:
            raise
        except (ValueError, KeyError, AttributeError) as error:  # 2024-13-01 is no date, `!!bool x` no truth value
            problem = f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


# PyYAML takes 1e-3 for text, since YAML 1.1 wants 1.0e-3; nobody who writes it means text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+"), list("-+0123456789")
)


def parse(path: Path, text: str | None = None) -> Document:
    """Read a YAML mapping, or a `text` that is to stand at the path.

    A key that stands twice is an error, since YAML would silently drop the first.
    """
    places: dict[Keys, str] = {}
    try:
        data = _load(_read(path) if text is None else text, lambda node: _note_places(node, (), path, places))
    except RecursionError as error:
        reason = "it is nested too deeply, or an alias stands inside its own anchor"
        raise RecipeError(f"{path}: not valid YAML: {reason}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {cause(error)}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with entries such as `model:` and `scheme:`")
    return Document(path, data, places)


def _read(path: Path) -> str:
    """The text of a recipe, a plain file of bounded size."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise RecipeError(f"cannot read the recipe {path}: it is no file but a folder, a pipe or a device")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise RecipeError(f"cannot read the recipe {path}: it is larger than {LARGEST:,} bytes")
        return content.decode()
    except (OSError, ValueError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", error)
        raise RecipeError(f"cannot read the recipe {str(path)[:200]}: {reason}") from error


def read_value(text: str) -> Any:
    """The plain data of a YAML text; a `YAMLError` or `RecursionError` where it is none, or has too many values."""
    return _load(text, lambda node: None)


def _load(text: str, look: Callable[[yaml.Node], None]) -> Any:
    """The plain data of a YAML text, at whose nodes `look` looks first."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        look(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """The values in a node, those of aliases counted wherever they stand; an error where they are too many."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise yaml.MarkedYAMLError(problem="an alias inside its own anchor", problem_mark=node.start_mark)
        return counts[id(node)]
    counts[id(node)] = 0  # not finished
    is_number = isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float"))
    if is_number and ":" in node.value and len(node.value) > LONGEST_NUMBER:  # of base 60
        problem = f"a number of {len(node.value):,} characters"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    count = 1 + sum(_count(part, counts) for part in parts)
    if count > MOST_VALUES:
        problem = f"more than {MOST_VALUES:,} values, with those that aliases repeat"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    counts[id(node)] = count
    return count


def apply_settings(document: Document, settings: Sequence[str]) -> Document:
    """Set entries by dotted keys: `scheme.bits=3`, `overrides.0.skip=true`; values are YAML.

    A plain name on the way, as in `grouper: contiguous`, becomes `{name: contiguous}`.
    """
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not dotted:
            raise RecipeError(f"--set {setting}: expected key=value, such as scheme.bits=3")
        try:
            value = read_value(text)
        except (yaml.YAMLError, RecursionError) as error:
            raise RecipeError(f"--set {setting}: the value is not valid YAML") from error
        keys: Keys = tuple(int(key) if key.isdecimal() and len(key) < 10 else key for key in dotted.strip().split("."))
        places = {key: place for key, place in document.places.items() if key[: len(keys)] != keys}
        try:
            data = _replaced(document.data, keys, value, setting)
        except RecursionError as error:
            raise RecipeError(f"--set {setting[:80]} …: nested too deeply") from error
        parents = (keys[:length] for length in range(1, len(keys)))
        made = {parent: f"--set {setting}" for parent in parents if parent not in document.places}
        document = replace(document, data=data, places=places | made | {keys: f"--set {setting}"})
    return document


def _replaced(data: Any, keys: Keys, value: Any, setting: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(data, list):
        if not isinstance(key, int) or key >= len(data):
            raise RecipeError(f"--set {setting}: {key!r} is none of the {len(data)} list entries, counted from 0")
        return [_replaced(item, rest, value, setting) if i == key else item for i, item in enumerate(data)]
    if isinstance(data, str):
        data = {"name": data}
    if data is not None and not isinstance(data, dict):
        raise RecipeError(f"--set {setting}: {key!r} is inside {data!r}, which has no entries")
    data = data or {}
    return {**data, str(key): _replaced(data.get(str(key)), rest, value, setting)}


def _note_places(node: yaml.Node, keys: Keys, path: Path, places: dict[Keys, str]) -> None:
    places[keys] = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="found unhashable key", problem_mark=key_node.start_mark)
            below = (*keys, key_node.value)
            if below in places:
                raise RecipeError(f"{path}:{key_node.start_mark.line + 1}: {key_node.value!r} stands here twice")
            _note_places(value, below, path, places)
            places[below] = f"{path}:{key_node.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_places(item, (*keys, index), path, places)
