"""`dashq schema` prints the schema of recipes with what is installed."""

import json

from commands import call
from dashq.recipe.schema import recipe_schema
from recipes import REGISTRY


def test_it_prints_the_schema_of_recipes() -> None:
    outcome = call("schema")
    assert (outcome.code, outcome.errors) == (0, "")
    assert json.loads(outcome.output) == recipe_schema(REGISTRY)
