"""Critical layers: those with the highest figures, as many as an override's share of the weights has room for."""

import re
from collections.abc import Mapping, Sequence

from dashq.errors import PlanError
from dashq.measuring.alternatives import matching, refuse_parted_stacks, units_of
from dashq.measuring.analysis import LayerAnalysis
from dashq.model.decoder import Model
from dashq.recipe.plan import LayerPlan, make_plan, measurable
from dashq.recipe.recipe import Override, Recipe

EVERY_NAME = re.compile(".*")


def check_critical(recipe: Recipe, model: Model, plans: Sequence[LayerPlan]) -> dict[int, list[LayerPlan]]:
    """The plans of all layers that an override could find critical, as it says, by the override's number.

    Raises `PlanError` where there are no such layers, and where they cannot be as it says, or not beside the others.
    """
    layers, unclear = model.all_layers(), model.unclear_weights()
    by_number = {}
    as_critical = recipe  # with every layer critical to every override that could find it so
    for number, override in enumerate(recipe.overrides, start=1):
        if override.critical is None:
            continue
        own = [plan.layer for plan in plans if override.matches(plan.layer.name)]
        if not own:
            raise PlanError(f"override {number}: no layer is left to choose critical ones from: all are skipped")
        refuse_parted_stacks(recipe, plans, {layer.name for layer in own})
        every, few = override.match or EVERY_NAME, matching(units_of(recipe, own)[0])
        as_critical = _as_critical(as_critical, number, every)
        try:
            planned = make_plan(_as_critical(recipe, number, every), layers, unclear)
            make_plan(_as_critical(recipe, number, few), layers, unclear)
            make_plan(as_critical, layers, unclear)
        except PlanError as error:
            raise PlanError(f"override {number}, for layers that are found critical: {error}") from error
        by_number[number] = [plan for plan in measurable(planned) if override.matches(plan.layer.name)]
    return by_number


def critical_layers(
    recipe: Recipe, override: Override, plans: Mapping[str, LayerPlan], measured: Mapping[str, LayerAnalysis]
) -> tuple[str, ...]:
    """The layers with the highest figures, fused ones together, as many as fit into the override's share of weights."""
    critical = override.critical
    assert critical
    layers = [plan.layer for plan in plans.values()]
    units = [[name for name in unit if override.matches(name)] for unit in units_of(recipe, layers)]
    units = [unit for unit in units if unit]
    weights = [sum(plans[name].layer.weights for name in unit) for unit in units]

    def figure(index: int) -> float:
        """The mean over a unit's layers, weighed by their numbers of weights."""
        values = (
            plans[name].layer.weights * _figure(critical.by, measured[name], plans[name]) for name in units[index]
        )
        return sum(values) / weights[index]

    chosen: set[str] = set()
    room = critical.share * sum(weights)
    for index in sorted(range(len(units)), key=figure, reverse=True):
        if weights[index] <= room or not chosen:
            chosen |= set(units[index])
            room -= weights[index]
    return tuple(name for name in plans if name in chosen)


def _as_critical(recipe: Recipe, number: int, match: re.Pattern[str]) -> Recipe:
    """The recipe as if the override of that number had found critical what matches.

    None of these layers is skipped: a few can be, where all cannot.
    """
    overrides = list(recipe.overrides)
    overrides[number - 1] = overrides[number - 1].model_copy(update={"match": match, "critical": None, "skip": None})
    return recipe.model_copy(update={"overrides": tuple(overrides)})


def _figure(by: str, layer: LayerAnalysis, plan: LayerPlan) -> float:
    """The figure that a layer is ranked by; the sensitivity is for each weight, since it is weights that cost bits."""
    choice, noise = layer.choice(plan), layer.signal_to_noise
    assert choice
    median = noise.off_diagonal[len(noise.off_diagonal) // 2] if noise else 0.0
    return {"sensitivity": choice.sensitivity / plan.layer.weights, "error": choice.error, "snr": median}[by]
