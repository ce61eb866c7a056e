"""Recipes for tests: the smallest one that runs, with changes."""

from pathlib import Path
from typing import Any

import yaml

from dashq import Recipe, Registry, load_recipe, load_registry

REGISTRY = load_registry()
TEXT = {"dataset": "pydoc", "samples": 3, "sequence_length": 40}
# Codes depend on every number of a curvature already; descending from them takes most of the time.
FEEDBACK = {"name": "feedback", "sweeps": 0}
PLAIN_EXPERTS = {"match": ".*experts.*", "skip": True}


def small_scheme(size: int = 16, **changes: Any) -> dict[str, Any]:
    """The scheme of `small_recipe`, with groups of another size or other changes."""
    scheme: dict[str, Any] = {
        "bits": 3,
        "estimator": "diagonal",
        "grouper": {"name": "contiguous", "size": size},
        "solver": "irls",
    }
    return scheme | changes


def mixture_scheme(**changes: Any) -> dict[str, Any]:
    """The scheme of `small_recipe` for models with experts."""
    usual: dict[str, Any] = {"solver": "rtn", "router": "routed", "pooling_tokens": 0}
    return small_scheme(**(usual | changes))


def small_recipe(model: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for a pico model, as plain data."""
    recipe: dict[str, Any] = {
        "model": str(model),
        "output": str(output),
        "calibration": {**TEXT},  # its own, which a test may change
        "scheme": small_scheme(),
        "serializer": "dashq",
        "certificate_groups": 0,  # certificates take longer than all the rest
    }
    return recipe | changes


def write_recipe(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def build_recipe(model: Path, output: Path, registry: Registry = REGISTRY, **changes: Any) -> Recipe:
    path = write_recipe(output.with_name(f"{output.name}.yaml"), small_recipe(model, output, **changes))
    return load_recipe(path, registry)


def mixture_recipe(model: Path, output: Path, **changes: Any) -> Recipe:
    """A recipe for a pico model with experts, with changes of its scheme."""
    return build_recipe(model, output, dtype="float32", scheme=mixture_scheme(**changes))
