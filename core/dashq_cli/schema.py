"""`dashq schema`."""

import json

import typer

from dashq_cli.imports import starting


@starting()
def schema() -> None:
    """Print the JSON schema of recipes, with the installed plugins' parameters.

    Editors complete and check a recipe that begins with the comment
    `# yaml-language-server: $schema=FILE`, where FILE is what this printed.
    """
    from dashq.recipe.schema import recipe_schema
    from dashq.registry import load_registry

    typer.echo(json.dumps(recipe_schema(load_registry()), indent=1))
