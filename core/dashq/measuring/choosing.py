"""Turn what a recipe leaves to measurement into plain overrides: critical layers, and bits within a budget."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from dashq.measuring.allocation import trade_off
from dashq.measuring.alternatives import alternatives_of, matching, stored_as
from dashq.measuring.analysis import Analysis, Choices
from dashq.measuring.budget import check_budget, choices_of_units, counted, in_words, offers_of, within_budget
from dashq.measuring.critical import check_critical, critical_layers
from dashq.measuring.saved import saved_measurement
from dashq.measuring.sensitivity import analyze
from dashq.model.decoder import Model
from dashq.recipe.plan import LayerPlan, make_plan, measurable
from dashq.recipe.recipe import Override, Recipe
from dashq.results.events import Listener
from dashq.results.report import BudgetCurve, Selection


def measured(
    recipe: Recipe,
    model: Model,
    choices: Choices,
    tokens: Int64[Tensor, "samples tokens"],
    inputs: Mapping[str, str],
    folder: Path | None = None,
    listen: Listener = lambda event: None,
) -> Analysis:
    """The measurement of the `choices` on `tokens`, which tells what a recipe leaves to measurement.

    It is saved in `folder` as it goes on, with the `inputs` that it is made from, those of `inputs_of`; of several
    processes only the first has a folder.
    """
    if folder is None:
        return analyze(recipe, model, choices, tokens=tokens)
    with saved_measurement(folder, recipe, choices, inputs) as parts:
        analysis = analyze(recipe, model, choices, listen, tokens=tokens, parts=parts)
        analysis.model_copy(update={"inputs": inputs}).save(folder)
    return analysis


def stored(
    recipe: Recipe, choices: Choices, inputs: Mapping[str, str], folders: Sequence[Path] = ()
) -> Analysis | None:
    """The earlier measurement in the output, or the first of these folders, that answers for these choices."""
    analyses = (Analysis.load(folder) for folder in folders or (recipe.output,))
    return next((analysis for analysis in analyses if analysis and not analysis.misfits(recipe, choices, inputs)), None)


def choices_for(recipe: Recipe, model: Model, bits: Sequence[int] = ()) -> dict[str, list[LayerPlan]]:
    """The plans to measure for each layer by name: that of its scheme, those that the budget offers, further `bits`.

    Raises `PlanError` for whatever can be refused without a measurement.
    """
    plans = measurable(make_plan(recipe, model.all_layers(), model.unclear_weights()))
    critical_plans = check_critical(recipe, model, plans)
    choices = {plan.layer.name: [plan] for plan in plans}
    if recipe.budget:
        offers = offers_of(recipe, plans)
        check_budget(recipe, plans, offers, critical_plans)
        for name, offered in offers.items():
            choices[name] += offered
    for name, alternatives in alternatives_of(recipe, plans, bits).items():
        choices[name] += alternatives.plans
    return {name: list({stored_as(plan): plan for plan in plans}.values()) for name, plans in choices.items()}


def settle(recipe: Recipe, model: Model, analysis: Analysis) -> tuple[Recipe, tuple[Selection, ...]]:
    """The recipe with measured choices in the place of those that were left to measurement, and the chosen layers.

    Raises `PlanError` where the budget cannot be kept.
    """
    settled, selections = _without_critical(recipe, model, analysis)
    if recipe.budget:
        overrides = list(settled.overrides)
        plans = make_plan(settled, model.all_layers(), model.unclear_weights())
        for alike in within_budget(settled, plans, analysis.by_name):
            names, scheme = tuple(plan.layer.name for plan in alike), alike[0].scheme
            selections.append(Selection(f"budget: {in_words(alike[0], [plan.size for plan in alike])}", names))
            grouper = scheme.grouper if recipe.budget.groupers else None
            overrides.append(Override(match=matching(names), bits=scheme.bits, type=scheme.type, grouper=grouper))
        settled = settled.model_copy(update={"overrides": tuple(overrides), "budget": None})
    return settled, tuple(selections)


def budget_curve(recipe: Recipe, model: Model, analysis: Analysis) -> BudgetCurve | None:
    """The expected loss that the best choices have at each number of bits per weight; None without a budget."""
    settled, _ = _without_critical(recipe, model, analysis)
    if not settled.budget:
        return None
    plans = make_plan(settled, model.all_layers(), model.unclear_weights())
    offers = offers_of(settled, plans)
    own = counted(plans, offers)
    weights = sum(plan.layer.weights for plan in own)
    _, options = choices_of_units(settled, offers, analysis.by_name)
    fixed = sum(plan.bytes for plan in own if plan.layer.name not in offers)
    points = tuple((8 * (point.bytes + fixed) / weights, point.cost) for point in trade_off(options))
    return BudgetCurve(settled.budget.bits_per_weight, points)


def _without_critical(recipe: Recipe, model: Model, analysis: Analysis) -> tuple[Recipe, list[Selection]]:
    """The recipe with overrides for the layers that were measured to be critical, and these layers."""
    planned = make_plan(recipe, model.all_layers(), model.unclear_weights())
    plans = {plan.layer.name: plan for plan in measurable(planned)}
    overrides, selections = [], []
    for number, override in enumerate(recipe.overrides, start=1):
        if override.critical:
            names = critical_layers(recipe, override, plans, analysis.by_name)
            weights = sum(plans[name].layer.weights for name in names)
            share = weights / sum(plan.layer.weights for plan in plans.values())
            title = f"override {number}: critical by {override.critical.by}, {share:.1%} of the weights"
            selections.append(Selection(title, names))
            override = override.model_copy(update={"match": matching(names), "critical": None})
        overrides.append(override)
    return recipe.model_copy(update={"overrides": tuple(overrides)}), selections
