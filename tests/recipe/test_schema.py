"""The schema takes what recipes may say, with plugins' parameters, and refuses what `load_recipe` refuses."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import PositiveInt

from dashq import Grouper, Grouping, RecipeError, hookimpl, load_recipe, load_registry
from dashq.recipe.schema import recipe_schema
from recipes import REGISTRY, small_recipe, small_scheme, write_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SCHEMA = recipe_schema(REGISTRY)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(json.dumps(SCHEMA)) == SCHEMA


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_keeps_it_and_names_it_for_editors(path: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text()))
    comment = path.read_text().splitlines()[0]
    assert comment.startswith("# yaml-language-server: $schema=")
    schema = path.parent / comment.partition("=")[2]
    assert json.loads(schema.read_text())["title"] == "Recipe"


ALLOWED: list[dict[str, Any]] = [
    {},
    {"budget": 2.5},
    {"budget": {"bits_per_weight": 3, "bits": 2, "groupers": "channel"}},
    {"overrides": [{"match": ".*", "bits": 2, "skip": None, "solver": {"name": "irls", "preset": "paper"}}]},
    {"tuner": {"name": "distill", "dataset": ["pydoc", {"name": "c4", "weight": 2}]}},
    {"calibration": {"dataset": {"name": "pydoc"}}},
]


@pytest.mark.parametrize("changes", ALLOWED, ids=str)
def test_short_forms_are_allowed_as_in_recipes(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "model", tmp_path / "out", **changes)
    load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe), REGISTRY)
    VALIDATOR.validate(recipe)


REFUSED: list[dict[str, Any]] = [
    {"modell": "x"},
    {"dtype": "float64"},
    {"scheme": small_scheme(bitz=3)},
    {"scheme": small_scheme(bits=9)},
    {"scheme": small_scheme(bits="3")},
    {"scheme": small_scheme(solver="fast")},
    {"scheme": small_scheme(solver={"name": "irls", "damping": 0.5, "size": 3})},
    {"scheme": small_scheme(solver={"damping": 0.5})},
    {"scheme": small_scheme(estimator="irls")},
    {"serializer": {"name": "gguf", "four_bits": "Q9"}},
    {"calibration": {"samples": 3}},
    {"overrides": [{"match": ".*", "bits": 0}]},
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_wrong_keys_and_values_are_refused_as_in_recipes(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "model", tmp_path / "out", **changes)
    with pytest.raises(RecipeError):
        load_recipe(write_recipe(tmp_path / "recipe.yaml", recipe), REGISTRY)
    assert not VALIDATOR.is_valid(recipe)


class StripedGrouper(Grouper):
    """Groups with a parameter that has no default."""

    name = "striped"
    stripes: PositiveInt

    def size_for(self, columns: int) -> int:
        return columns // self.stripes

    def group(self, weight: Any, curvature: Any) -> Grouping:
        return Grouping(columns=weight.shape[1], size=self.size_for(weight.shape[1]))


class StripedPlugin:
    @hookimpl
    def dashq_groupers(self) -> list[type[Grouper]]:
        return [StripedGrouper]


@pytest.mark.parametrize(
    ("grouper", "allowed"),
    [
        ({"name": "striped", "stripes": 4}, True),
        ({"name": "striped", "stripes": 0}, False),
        ({"name": "striped"}, False),
        ("striped", False),
        ("channel", True),
    ],
)
def test_parameters_of_a_strangers_plugin_are_known(grouper: Any, allowed: bool, tmp_path: Path) -> None:
    schema = recipe_schema(load_registry(StripedPlugin()))
    recipe = small_recipe(tmp_path / "model", tmp_path / "out", scheme=small_scheme(grouper=grouper))
    assert jsonschema.Draft202012Validator(schema).is_valid(recipe) is allowed
