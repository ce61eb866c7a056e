"""Choices for tests: recipes that are settled by a measurement, and what they come to."""

from pathlib import Path
from typing import Any

from dashq import LayerPlan, Recipe, make_plan
from dashq.measuring.analysis import Analysis
from dashq.measuring.choosing import settle
from dashq.quantizing.opening import open_model
from recipes import build_recipe

GROUPERS = [{"name": "contiguous", "size": size} for size in (8, 16)]


def settled(model: Path, analysis: Analysis, folder: Path, **changes: Any) -> tuple[Recipe, dict[str, tuple[str, ...]]]:
    """The recipe with measured choices, and the chosen layers by what they were chosen for."""
    recipe = build_recipe(model, folder / "out", **changes)
    result, selections = settle(recipe, open_model(recipe), analysis)
    return result, {selection.what: selection.layers for selection in selections}


def plans_of(recipe: Recipe) -> dict[str, LayerPlan]:
    """The plan of every layer by name."""
    return {plan.layer.name: plan for plan in make_plan(recipe, open_model(recipe).layers())}


def bits_per_weight(recipe: Recipe) -> float:
    """The bits that a weight takes on average."""
    plans = plans_of(recipe).values()
    return float(8 * sum(plan.bytes for plan in plans) / sum(plan.layer.weights for plan in plans))
