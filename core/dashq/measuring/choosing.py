"""Turn what a recipe leaves to measurement into plain overrides: critical layers, and bits within a budget."""

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from dashq.errors import PlanError
from dashq.measuring.allocation import Option, allocate, trade_off
from dashq.measuring.saved import saved_measurement
from dashq.measuring.sensitivity import Analysis, Choices, LayerAnalysis, analyze
from dashq.model.decoder import Model
from dashq.recipe.plan import LayerPlan, advised, fused_with, is_decided, kind_of, make_plan, plan_layer
from dashq.recipe.recipe import Override, Recipe
from dashq.results.events import Listener
from dashq.results.report import BudgetCurve, Selection
from dashq.strategies import Grouper

USUAL_BITS = (2, 3, 4)
EVERY_NAME = re.compile(".*")


@dataclass(frozen=True)
class _Alternatives:
    """Other ways to store a layer: the plans that are possible, and by bits the reason why one is not."""

    plans: list[LayerPlan]
    refusals: dict[int, PlanError]


def measured(
    recipe: Recipe,
    model: Model,
    choices: Choices,
    tokens: Int64[Tensor, "samples tokens"],
    inputs: Mapping[str, str],
    folder: Path,
    listen: Listener,
) -> Analysis:
    """The measurement of the `choices` on `tokens`, which tells what a recipe leaves to measurement.

    It may be an earlier one that the output holds for this recipe and these `inputs`, which are those of `inputs_of`;
    else it is saved in `folder` as it goes on.
    """
    analysis = stored(recipe, choices, inputs, (folder, recipe.output))
    if analysis is None:
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
    plans = make_plan(recipe, model.all_layers(), model.unclear_weights())
    critical_plans = _check_critical(recipe, model, plans)
    choices = {plan.layer.name: [plan] for plan in plans}
    if recipe.budget:
        offers = _offers(recipe, plans)
        _check_budget(recipe, plans, offers, critical_plans)
        for name, offered in offers.items():
            choices[name] += offered
    for name, alternatives in _alternatives(recipe, plans, bits).items():
        choices[name] += alternatives.plans
    return {name: list({_label(plan): plan for plan in plans}.values()) for name, plans in choices.items()}


def settle(recipe: Recipe, model: Model, analysis: Analysis) -> tuple[Recipe, tuple[Selection, ...]]:
    """The recipe with measured choices in the place of those that were left to measurement, and the chosen layers.

    Raises `PlanError` where the budget cannot be kept.
    """
    settled, selections = _without_critical(recipe, model, analysis)
    if recipe.budget:
        overrides = list(settled.overrides)
        plans = make_plan(settled, model.all_layers(), model.unclear_weights())
        for alike in _within_budget(settled, plans, analysis.by_name):
            names, scheme = tuple(plan.layer.name for plan in alike), alike[0].scheme
            sizes = " or ".join(map(str, sorted({plan.size for plan in alike})))
            selections.append(Selection(f"budget: {scheme.bits} bits in groups of {sizes}", names))
            grouper = scheme.grouper if recipe.budget.groupers else None
            overrides.append(Override(match=matching(names), bits=scheme.bits, grouper=grouper))
        settled = settled.model_copy(update={"overrides": tuple(overrides), "budget": None})
    return settled, tuple(selections)


def budget_curve(recipe: Recipe, model: Model, analysis: Analysis) -> BudgetCurve | None:
    """The expected loss that the best choices have at each number of bits per weight; None without a budget."""
    settled, _ = _without_critical(recipe, model, analysis)
    if not settled.budget:
        return None
    plans = make_plan(settled, model.all_layers(), model.unclear_weights())
    offers, weights = _offers(settled, plans), sum(plan.layer.weights for plan in plans)
    _, options = _choices_of_units(settled, offers, analysis.by_name)
    fixed = sum(plan.bytes for plan in plans if plan.layer.name not in offers)
    points = tuple((8 * (point.bytes + fixed) / weights, point.cost) for point in trade_off(options))
    return BudgetCurve(settled.budget.bits_per_weight, points)


def _without_critical(recipe: Recipe, model: Model, analysis: Analysis) -> tuple[Recipe, list[Selection]]:
    """The recipe with overrides for the layers that were measured to be critical, and these layers."""
    plans = {plan.layer.name: plan for plan in make_plan(recipe, model.all_layers(), model.unclear_weights())}
    overrides, selections = [], []
    for number, override in enumerate(recipe.overrides, start=1):
        if override.critical:
            names = _critical_layers(recipe, override, plans, analysis.by_name)
            weights = sum(plans[name].layer.weights for name in names)
            share = weights / sum(plan.layer.weights for plan in plans.values())
            title = f"override {number}: critical by {override.critical.by}, {share:.1%} of the weights"
            selections.append(Selection(title, names))
            override = override.model_copy(update={"match": matching(names), "critical": None})
        overrides.append(override)
    return recipe.model_copy(update={"overrides": tuple(overrides)}), selections


def matching(names: Sequence[str]) -> re.Pattern[str]:
    """A pattern for exactly these names; those that differ in their last number alone share one alternative."""
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        parts = re.fullmatch(r"(.*?)(\d*)(\D*)", name)
        assert parts
        numbers[re.escape(parts[1]), re.escape(parts[3])].append(parts[2])
    return re.compile("|".join(f"{before}({'|'.join(own)}){after}" for (before, after), own in numbers.items()))


def _check_critical(recipe: Recipe, model: Model, plans: Sequence[LayerPlan]) -> dict[int, list[LayerPlan]]:
    """The plans of all layers that an override could find critical, as it says, by the override's number.

    Raises `PlanError` where there are no such layers, and where they cannot be as it says, or not beside the others.
    """
    layers, unclear = model.all_layers(), model.unclear_weights()
    by_number = {}
    as_critical = recipe  # with every layer critical to every override that could find it so
    for number, override in enumerate(recipe.overrides, start=1):
        if override.critical is None:
            continue
        names = [plan.layer.name for plan in plans if override.matches(plan.layer.name)]
        if not names:
            raise PlanError(f"override {number}: no layer is left to choose critical ones from: all are skipped")
        every, few = override.match or EVERY_NAME, matching(_units(recipe, names)[0])
        as_critical = _as_critical(as_critical, number, every)
        try:
            planned = make_plan(_as_critical(recipe, number, every), layers, unclear)
            make_plan(_as_critical(recipe, number, few), layers, unclear)
            make_plan(as_critical, layers, unclear)
        except PlanError as error:
            raise PlanError(f"override {number}, for layers that are found critical: {error}") from error
        by_number[number] = [plan for plan in planned if override.matches(plan.layer.name)]
    return by_number


def _as_critical(recipe: Recipe, number: int, match: re.Pattern[str]) -> Recipe:
    """The recipe as if the override of that number had found critical what matches.

    None of these layers is skipped: a few can be, where all cannot.
    """
    overrides = list(recipe.overrides)
    overrides[number - 1] = overrides[number - 1].model_copy(update={"match": match, "critical": None, "skip": None})
    return recipe.model_copy(update={"overrides": tuple(overrides)})


def _critical_layers(
    recipe: Recipe, override: Override, plans: Mapping[str, LayerPlan], measured: Mapping[str, LayerAnalysis]
) -> tuple[str, ...]:
    """The layers with the highest figures, fused ones together, as many as fit into the override's share of weights."""
    critical = override.critical
    assert critical
    units = [[name for name in unit if override.matches(name)] for unit in _units(recipe, list(plans))]
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


def _figure(by: str, layer: LayerAnalysis, plan: LayerPlan) -> float:
    """The figure that a layer is ranked by; the sensitivity is for each weight, since it is weights that cost bits."""
    choice, noise = layer.choice(plan), layer.signal_to_noise
    assert choice
    median = noise.off_diagonal[len(noise.off_diagonal) // 2] if noise else 0.0
    return {"sensitivity": choice.sensitivity / plan.layer.weights, "error": choice.error, "snr": median}[by]


def _within_budget(
    recipe: Recipe, plans: Sequence[LayerPlan], measured: Mapping[str, LayerAnalysis]
) -> Iterable[list[LayerPlan]]:
    """The plans that cost least within the budget, alike ones together, of the layers that it decides about."""
    offers = _offers(recipe, plans)
    units, options = _choices_of_units(recipe, offers, measured)
    chosen = allocate(options, _budget_bytes(recipe, plans, offers))
    alike: dict[tuple[int, str], list[LayerPlan]] = defaultdict(list)
    for unit, index in zip(units, chosen, strict=True):
        for plan in unit[index]:
            alike[_label(plan)].append(plan)
    return [alike[label] for label in sorted(alike)]


def _choices_of_units(
    recipe: Recipe, offers: Mapping[str, Sequence[LayerPlan]], measured: Mapping[str, LayerAnalysis]
) -> tuple[list[list[list[LayerPlan]]], list[list[Option]]]:
    """For each unit the ways to store its layers, and the bytes and the expected loss of each way."""
    units = [_storable_alike(unit, offers) for unit in _units(recipe, list(offers))]
    return units, [[_option(alternative, measured) for alternative in unit] for unit in units]


def _option(plans: Sequence[LayerPlan], measured: Mapping[str, LayerAnalysis]) -> Option:
    """The bytes and the expected loss of a unit's layers stored as planned."""
    cost = 0.0
    for plan in plans:
        choice = measured[plan.layer.name].choice(plan)
        assert choice
        cost += choice.sensitivity
    return Option(sum(plan.bytes for plan in plans), cost)


def _offers(recipe: Recipe, plans: Sequence[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """The plans that the budget offers each layer; those whose bits or groups an override decides are left out."""
    budget = recipe.budget
    assert budget
    undecided = [plan for plan in plans if not is_decided(recipe, plan.layer)]
    alternatives = _alternatives(recipe, undecided, budget.bits or USUAL_BITS, budget.groupers)
    for name, own in alternatives.items():
        if not own.plans:
            reason = advised(list(own.refusals.values())[-1], recipe.registry)
            raise PlanError(f"{name}: nothing that the budget offers is possible: {reason}")
    offers = {name: own.plans for name, own in alternatives.items()}
    possible = {plan.scheme.bits for offered in offers.values() for plan in offered}
    for bits in budget.bits:
        if offers and bits not in possible:
            last = alternatives[undecided[-1].layer.name]
            raise PlanError(f"budget: no layer can have {bits} bits: {advised(last.refusals[bits], recipe.registry)}")
    return offers


def _alternatives(
    recipe: Recipe, plans: Sequence[LayerPlan], bits: Sequence[int], groupers: Sequence[Grouper] = ()
) -> dict[str, _Alternatives]:
    """The layers by name with each of these bits and groupers, or their own groups where none are given."""
    kinds: dict[Hashable, _Alternatives] = {}
    by_name: dict[str, _Alternatives] = {}
    for plan in plans:
        kind = kind_of(plan.layer, plan.rule)
        if kind not in kinds:
            kinds[kind] = _Alternatives([], {})
            for width, grouper in product(bits, groupers or (plan.scheme.grouper,)):
                scheme = plan.scheme.model_copy(update={"bits": width, "grouper": grouper})
                try:
                    kinds[kind].plans.append(plan_layer(recipe, plan.layer, scheme, "budget"))
                except PlanError as error:
                    kinds[kind].refusals[width] = error
        own_plans = [replace(other, layer=plan.layer) for other in kinds[kind].plans]
        by_name[plan.layer.name] = _Alternatives(own_plans, kinds[kind].refusals)
    return by_name


def _check_budget(
    recipe: Recipe,
    plans: Sequence[LayerPlan],
    offers: Mapping[str, Sequence[LayerPlan]],
    critical_plans: Mapping[int, Sequence[LayerPlan]],
) -> None:
    """Refuse a budget that cannot be met, beside critical layers too, or a format in which layers cannot differ."""
    assert recipe.budget
    weights, wanted = sum(plan.layer.weights for plan in plans), recipe.budget.bits_per_weight
    alternatives = [_storable_alike(unit, offers) for unit in _units(recipe, list(offers))]
    smallest = [min(unit, key=_bytes) for unit in alternatives]
    missing = sum(map(_bytes, smallest)) - _budget_bytes(recipe, plans, offers)
    if missing > 0:
        offered = sorted({f"{plan.scheme.bits} bits in groups of {plan.size}" for unit in smallest for plan in unit})
        raise PlanError(
            f"budget.bits_per_weight: {wanted:g} cannot be met: the least possible is "
            f"{wanted + 8 * missing / weights:.4g}, with {', '.join(offered) or 'what overrides decide'}. "
            "A larger number is possible, or fewer budget.bits, or larger groups in budget.groupers"
        )
    least = {plan.layer.name: plan for unit in smallest for plan in unit}
    for number, critical in critical_plans.items():
        more = _least_added(recipe, number, critical, least)
        if missing + more > 0:
            bits = sorted({plan.scheme.bits for plan in critical})
            raise PlanError(
                f"budget.bits_per_weight: {wanted:g} cannot be met beside override {number}, whose critical layers "
                f"have {' or '.join(map(str, bits))} bits: the least possible is about "
                f"{wanted + 8 * (missing + more) / weights:.4g}. A larger number is possible, or a smaller share"
            )
    # The format is shown layers as different as the budget may make them: one has its first offer, others their last.
    offered_plans = list(offers.values()) or [list(plans)]
    recipe.serializer.check([offered_plans[-1][0].stored, *(own[-1].stored for own in offered_plans[:-1])])


def _least_added(recipe: Recipe, number: int, critical: Sequence[LayerPlan], least: Mapping[str, LayerPlan]) -> float:
    """The bytes that an override's critical layers take at least beyond what the budget would give them at least.

    Which layers these will be is not known, but how many weights they have: so much of the share as whole units fill.
    """
    override = recipe.overrides[number - 1]
    own = {plan.layer.name: plan for plan in critical if plan.layer.name in least}
    if not override.critical or override.skip or not (override.bits or override.grouper) or len(own) < len(critical):
        return 0.0
    units = _units(recipe, list(own))
    sizes = [sum(own[name].layer.weights for name in unit) for unit in units]
    added = [sum(own[name].bytes - least[name].bytes for name in unit) for unit in units]
    weights = max(min(sizes), override.critical.share * sum(sizes) - max(sizes))
    return weights * min(more / size for more, size in zip(added, sizes, strict=True))


def _bytes(plans: Sequence[LayerPlan]) -> int:
    return sum(plan.bytes for plan in plans)


def _budget_bytes(recipe: Recipe, plans: Sequence[LayerPlan], offers: Collection[str]) -> int:
    """The bytes that the budget leaves to the layers that it decides about, given by name."""
    assert recipe.budget
    fixed = sum(plan.bytes for plan in plans if plan.layer.name not in offers)
    return int(recipe.budget.bits_per_weight * sum(plan.layer.weights for plan in plans) / 8) - fixed


def _storable_alike(unit: Sequence[str], offers: Mapping[str, Sequence[LayerPlan]]) -> list[list[LayerPlan]]:
    """The ways to store the layers of a unit alike, each with a plan for every layer."""
    by_label = [{_label(plan): plan for plan in offers[name]} for name in unit]
    shared = [label for label in by_label[0] if all(label in plans for plans in by_label)]
    if not shared:
        raise PlanError(f"{', '.join(unit)}: runtimes fuse these layers, and the budget offers nothing that all can be")
    return [[plans[label] for plans in by_label] for label in shared]


def _units(recipe: Recipe, names: Sequence[str]) -> list[list[str]]:
    """The layers that are decided about together: those that the format's runtimes fuse, else each alone."""
    together: dict[str, list[str]] = defaultdict(list)
    for name in names:
        together[fused_with(name)[0] if recipe.serializer.runtimes_fuse_layers else name].append(name)
    return list(together.values())


def _label(plan: LayerPlan) -> tuple[int, str]:
    """The part of a plan that a budget decides, to compare plans by."""
    return plan.scheme.bits, plan.scheme.grouper.model_dump_json()
