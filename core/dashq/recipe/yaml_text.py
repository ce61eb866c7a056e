"""YAML with line numbers, so that an error can say where it is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dashq.errors import RecipeError

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """The content of a YAML file, changed by `--set` or not, and the place of each entry."""

    path: Path
    data: dict[str, Any]
    places: Mapping[Keys, str]

    def where(self, keys: Keys) -> str:
        """The place of an entry, or of the nearest one around it that stands in the file."""
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]


class _Loader(yaml.SafeLoader):
    """Reads plain data, and says with its place which value is not of the type that it looks like or is marked with."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, KeyError, AttributeError) as error:  # 2024-13-01 is no date, `!!bool x` no truth value
            problem = f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def parse(path: Path) -> Document:
    """Read a YAML mapping; a key that stands twice is an error, since YAML would silently drop the first."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"cannot read the recipe {path}: {reason}") from error
    places: dict[Keys, str] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.load(text, Loader=_Loader)
        if node is not None:
            _note_places(node, (), path, places)
    except RecursionError as error:
        reason = "it is nested too deeply, or an alias stands inside its own anchor"
        raise RecipeError(f"{path}: not valid YAML: {reason}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with entries such as `model:` and `scheme:`")
    return Document(path, data, places)


def apply_settings(document: Document, settings: Sequence[str]) -> Document:
    """Set entries by dotted keys: `scheme.bits=3`, `overrides.0.skip=true`; values are YAML.

    A plain name on the way, as in `grouper: contiguous`, becomes `{name: contiguous}`.
    """
    for setting in settings:
        dotted, equals, text = setting.partition("=")
        if not equals or not dotted:
            raise RecipeError(f"--set {setting}: expected key=value, such as scheme.bits=3")
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, RecursionError) as error:
            raise RecipeError(f"--set {setting}: the value is not valid YAML") from error
        keys: Keys = tuple(int(key) if key.isdecimal() else key for key in dotted.strip().split("."))
        places = {key: place for key, place in document.places.items() if key[: len(keys)] != keys}
        data = _replaced(document.data, keys, value, setting)
        document = replace(document, data=data, places=places | {keys: f"--set {setting}"})
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
            below = (*keys, key_node.value)
            if below in places:
                raise RecipeError(f"{path}:{key_node.start_mark.line + 1}: {key_node.value!r} stands here twice")
            _note_places(value, below, path, places)
            places[below] = f"{path}:{key_node.start_mark.line + 1}"
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_places(item, (*keys, index), path, places)
