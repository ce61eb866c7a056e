"""The JSON schema of recipes, with the parameters of the installed plugins: for editors, and for other programs."""

from collections.abc import Mapping
from typing import Any

from dashq.recipe.plan import has_defaults
from dashq.recipe.purpose import FOR, Purpose
from dashq.recipe.recipe import Recipe
from dashq.registry import Registry
from dashq.strategies import KINDS, Strategy

DIALECT = "https://json-schema.org/draft/2020-12/schema"
ALWAYS = ("model", "output")  # all else that a recipe needs, a target can choose
_DEFINITIONS = "$defs"


def recipe_schema(registry: Registry) -> dict[str, Any]:
    """The schema that recipes keep where strategies are those of `registry`.

    It knows keys, types and bounds; what several keys have to do with one another, `load_recipe` alone knows.
    """
    schema = Recipe.model_json_schema()
    definitions = schema[_DEFINITIONS]
    for kind, interface in KINDS.items():
        choices = []
        for name, cls in getattr(registry, kind).items():
            choice = cls.model_json_schema()
            definitions |= choice.pop(_DEFINITIONS, {})
            choices.append(_named(name, choice))
        definitions[interface.__name__] = _one_of(getattr(registry, kind), choices)
    schema["properties"][FOR] = {"anyOf": [{"enum": [*registry.targets]}, Purpose.model_json_schema()]}
    needed = [key for key in schema["required"] if key not in ALWAYS]
    schema |= {"required": [*ALWAYS], "anyOf": [{"required": [FOR]}, {"required": needed}]}
    return {"$schema": DIALECT, **schema}


def _named(name: str, choice: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a strategy's parameters as that of a mapping with its `name` among them."""
    return {
        **choice,
        "title": name,
        "properties": {"name": {"const": name}, **choice["properties"]},
        "required": ["name", *choice.get("required", [])],
    }


def _one_of(classes: Mapping[str, type[Strategy]], choices: list[dict[str, Any]]) -> dict[str, Any]:
    """A strategy by its name alone, where it can do without parameters, or by one of these mappings."""
    return {"anyOf": [{"enum": [name for name, cls in classes.items() if has_defaults(cls)]}, *choices]}
