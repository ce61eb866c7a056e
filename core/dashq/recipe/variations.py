"""The variations of a recipe that a sweep goes through: every combination of the values of some of its entries."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import yaml

from dashq.errors import UsageError
from dashq.recipe.yaml_text import read_value


@dataclass(frozen=True)
class Variation:
    """One combination: a `name` that can be that of a folder, and its values by the dotted keys of their entries."""

    name: str
    values: Mapping[str, Any]

    @property
    def settings(self) -> list[str]:
        """The values as settings for `load_recipe`."""
        return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in self.values.items()]


def variations(axes: Sequence[str]) -> list[Variation]:
    """All combinations of the values that `axes` such as `scheme.bits=2,3` give to entries, the last one fastest.

    Values are YAML, as in `scheme.solver=irls,{name: irls, p: 0.7}`. The names do not depend on other combinations.
    Raises `UsageError` for an axis that is not of this form, or gives a value twice.
    """
    values = dict(map(_axis, axes))
    if len(values) < len(axes):
        raise UsageError("--vary names an entry twice: give all of its values at once, as in --vary scheme.bits=2,3")
    ends = Counter(key.rpartition(".")[2] for key in values)
    titles = {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in values}
    every = [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]
    named = [Variation("_".join(_word(titles[key], value) for key, value in own.items()), own) for own in every]
    counts: Counter[str] = Counter()
    unique = []
    for variation in named:
        counts[variation.name] += 1
        number = counts[variation.name]
        unique.append(variation if number == 1 else replace(variation, name=f"{variation.name}_{number}"))
    return unique


def in_words(value: Any) -> str:
    """A value in one line, a strategy with a name and nothing else by its name."""
    if isinstance(value, dict) and "name" in value:
        others = [f"{key}={in_words(other)}" for key, other in value.items() if key != "name"]
        return f"{value['name']}({', '.join(others)})" if others else str(value["name"])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _axis(text: str) -> tuple[str, list[Any]]:
    """The key and the values of an axis."""
    key, equals, values = text.partition("=")
    try:
        listed = read_value(f"[{values}]")
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--vary {text}: the values are not valid YAML") from error
    if not (key.strip() and equals and listed):
        raise UsageError(f"--vary {text}: expected key=value,value, such as scheme.bits=2,3")
    if any(value in listed[:index] for index, value in enumerate(listed)):
        raise UsageError(f"--vary {text}: the same value stands there twice")
    return key.strip(), listed


def _word(title: str, value: Any) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{title} {in_words(value)}").strip("-.")
