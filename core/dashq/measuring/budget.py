"""A budget of bits per weight: the plans that it offers each layer, and those that cost least within it."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from dashq.data import Layer
from dashq.errors import PlanError
from dashq.measuring.allocation import Option, allocate
from dashq.measuring.alternatives import (
    alternatives_of,
    refuse_parted_stacks,
    storable_alike,
    stored_as,
    types_at,
    units_of,
)
from dashq.measuring.analysis import LayerAnalysis
from dashq.recipe.plan import LayerPlan, advised, is_decided
from dashq.recipe.recipe import Recipe

USUAL_BITS = (2, 3, 4)


def offers_of(recipe: Recipe, plans: Sequence[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """The plans that the budget offers each layer; those whose bits or groups an override decides are left out."""
    budget = recipe.budget
    assert budget
    undecided = [plan for plan in plans if not is_decided(recipe, plan.layer)]
    _check_types(recipe)
    alternatives = alternatives_of(recipe, undecided, budget.bits or USUAL_BITS, budget.groupers, budget.types)
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


def check_budget(
    recipe: Recipe,
    plans: Sequence[LayerPlan],
    offers: Mapping[str, Sequence[LayerPlan]],
    critical_plans: Mapping[int, Sequence[LayerPlan]],
) -> None:
    """Refuse a budget that cannot be met, beside critical layers too, or a format in which layers cannot differ."""
    assert recipe.budget
    wanted = recipe.budget.bits_per_weight
    weights = sum(plan.layer.weights for plan in counted(plans, offers))
    refuse_parted_stacks(recipe, plans, offers)
    alternatives = [storable_alike(unit, offers) for unit in units_of(recipe, _layers(offers))]
    smallest = [min(unit, key=_bytes) for unit in alternatives]
    missing = sum(map(_bytes, smallest)) - _budget_bytes(recipe, plans, offers)
    if missing > 0:
        offered = sorted({in_words(plan, [plan.size]) for unit in smallest for plan in unit})
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


def within_budget(
    recipe: Recipe, plans: Sequence[LayerPlan], measured: Mapping[str, LayerAnalysis]
) -> Iterable[list[LayerPlan]]:
    """The plans that cost least within the budget, alike ones together, of the layers that it decides about."""
    offers = offers_of(recipe, plans)
    units, options = choices_of_units(recipe, offers, measured)
    chosen = allocate(options, _budget_bytes(recipe, plans, offers))
    alike: dict[tuple[int, str, str], list[LayerPlan]] = defaultdict(list)
    for unit, index in zip(units, chosen, strict=True):
        for plan in unit[index]:
            alike[stored_as(plan)].append(plan)
    return [alike[label] for label in sorted(alike)]


def in_words(plan: LayerPlan, sizes: Collection[int]) -> str:
    """The bits and the type that a layer is planned with, in groups of one of these sizes."""
    own = f" ({plan.scheme.type})" if plan.scheme.type else ""
    return f"{plan.scheme.bits} bits{own} in groups of {' or '.join(map(str, sorted(set(sizes))))}"


def choices_of_units(
    recipe: Recipe, offers: Mapping[str, Sequence[LayerPlan]], measured: Mapping[str, LayerAnalysis]
) -> tuple[list[list[list[LayerPlan]]], list[list[Option]]]:
    """For each unit the ways to store its layers, and the bytes and the expected loss of each way."""
    units = [storable_alike(unit, offers) for unit in units_of(recipe, _layers(offers))]
    return units, [[_option(alternative, measured) for alternative in unit] for unit in units]


def _layers(offers: Mapping[str, Sequence[LayerPlan]]) -> list[Layer]:
    """The layers that the budget decides about."""
    return [own[0].layer for own in offers.values()]


def _check_types(recipe: Recipe) -> None:
    """Refuse types that the format has not at the bits on offer, and bits that none of the types is of."""
    assert recipe.budget
    wanted = set(recipe.budget.types)
    types = {bits: [name for name in types_at(recipe, bits) if name] for bits in recipe.budget.bits or USUAL_BITS}
    possible = ", ".join(name for names in types.values() for name in names) or "none"
    for bits, names in types.items():
        if wanted and recipe.budget.bits and wanted.isdisjoint(names):
            raise PlanError(f"budget.types: none is of {bits} bits; possible at the bits on offer are: {possible}")
    if missing := wanted.difference(*types.values()):
        raise PlanError(
            f"budget.types: format {recipe.serializer.name} has no {', '.join(sorted(missing))} at the bits on offer; "
            f"possible are: {possible}"
        )


def _option(plans: Sequence[LayerPlan], measured: Mapping[str, LayerAnalysis]) -> Option:
    """The bytes and the expected loss of a unit's layers stored as planned."""
    cost = 0.0
    for plan in plans:
        choice = measured[plan.layer.name].choice(plan)
        assert choice
        cost += choice.sensitivity
    return Option(sum(plan.bytes for plan in plans), cost)


def _least_added(recipe: Recipe, number: int, critical: Sequence[LayerPlan], least: Mapping[str, LayerPlan]) -> float:
    """The bytes that an override's critical layers take at least beyond what the budget would give them at least.

    Which layers these will be is not known, but how many weights they have: so much of the share as whole units fill.
    """
    override = recipe.overrides[number - 1]
    own = {plan.layer.name: plan for plan in critical if plan.layer.name in least}
    if not override.critical or override.skip or not (override.bits or override.grouper) or len(own) < len(critical):
        return 0.0
    units = units_of(recipe, [plan.layer for plan in own.values()])
    sizes = [sum(own[name].layer.weights for name in unit) for unit in units]
    added = [sum(own[name].bytes - least[name].bytes for name in unit) for unit in units]
    weights = max(min(sizes), override.critical.share * sum(sizes) - max(sizes))
    return weights * min(more / size for more, size in zip(added, sizes, strict=True))


def _budget_bytes(recipe: Recipe, plans: Sequence[LayerPlan], offers: Collection[str]) -> int:
    """The bytes that the budget leaves to the layers that it decides about, given by name."""
    assert recipe.budget
    own = counted(plans, offers)
    fixed = sum(plan.bytes for plan in own if plan.layer.name not in offers)
    return int(recipe.budget.bits_per_weight * sum(plan.layer.weights for plan in own) / 8) - fixed


def counted(plans: Sequence[LayerPlan], offers: Collection[str]) -> list[LayerPlan]:
    """The plans that a budget counts: all of blocks, and those outside of them that it decides about."""
    return [plan for plan in plans if plan.layer.role == "linear" or plan.layer.name in offers]


def _bytes(plans: Sequence[LayerPlan]) -> int:
    return sum(plan.bytes for plan in plans)
