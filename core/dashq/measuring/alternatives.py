"""The ways in which layers can be stored: at other bits and in other groups, alike where they belong together."""

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from dashq.data import Layer
from dashq.errors import PlanError
from dashq.recipe.plan import LayerPlan, fused_with, kind_of, plan_layer
from dashq.recipe.recipe import Recipe
from dashq.strategies import Grouper


@dataclass(frozen=True)
class Alternatives:
    """Other ways to store a layer: the plans that are possible, and by bits the reason why one is not."""

    plans: list[LayerPlan]
    refusals: dict[int, PlanError]


def alternatives_of(
    recipe: Recipe,
    plans: Sequence[LayerPlan],
    bits: Sequence[int],
    groupers: Sequence[Grouper] = (),
    types: Sequence[str] = (),
) -> dict[str, Alternatives]:
    """The layers by name with each of these bits, types and groupers.

    Without `types` each of the format's, and without `groupers` the layers' own groups.
    """
    names = {width: [name for name in types_at(recipe, width) if not types or name in types] for width in bits}
    kinds: dict[Hashable, Alternatives] = {}
    by_name: dict[str, Alternatives] = {}
    for plan in plans:
        kind = kind_of(plan.layer, plan.rule)
        if kind not in kinds:
            kinds[kind] = Alternatives([], {})
            for width, grouper in product(bits, groupers or (plan.scheme.grouper,)):
                for name in names[width]:
                    scheme = plan.scheme.model_copy(update={"bits": width, "type": name, "grouper": grouper})
                    try:
                        kinds[kind].plans.append(plan_layer(recipe, plan.layer, scheme, "budget"))
                    except PlanError as error:
                        kinds[kind].refusals.setdefault(width, error)
        own_plans = [replace(other, layer=plan.layer) for other in kinds[kind].plans]
        by_name[plan.layer.name] = Alternatives(own_plans, kinds[kind].refusals)
    return by_name


def types_at(recipe: Recipe, bits: int) -> list[str | None]:
    """The names of the format's types of these bits; None alone where it has no names, or not these bits."""
    try:
        return list(recipe.serializer.types(bits)) or [None]
    except PlanError:
        return [None]  # the plan says which bits are possible


def storable_alike(unit: Sequence[str], offers: Mapping[str, Sequence[LayerPlan]]) -> list[list[LayerPlan]]:
    """The ways to store the layers of a unit alike, each with a plan for every layer."""
    by_label = [{stored_as(plan): plan for plan in offers[name]} for name in unit]
    shared = [label for label in by_label[0] if all(label in plans for plans in by_label)]
    if not shared:
        raise PlanError(
            f"{', '.join(unit)}: the format wants these layers alike, and the budget offers nothing that all can be"
        )
    return [[plans[label] for plans in by_label] for label in shared]


def units_of(recipe: Recipe, layers: Iterable[Layer]) -> list[list[str]]:
    """The names of layers that are decided about together.

    Those are the ones that the format's runtimes fuse, and experts of one stack where its files hold such; else each
    layer is alone.
    """
    serializer = recipe.serializer
    together: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        unit = fused_with(layer.name)[0] if serializer.runtimes_fuse_layers else layer.name
        together[(serializer.stacks_experts and layer.stack) or unit].append(layer.name)
    return list(together.values())


def refuse_parted_stacks(recipe: Recipe, plans: Sequence[LayerPlan], names: Collection[str]) -> None:
    """Raise a `PlanError` where some experts of a stack are among `names` and others are not, and that must not be."""
    if not recipe.serializer.stacks_experts:
        return
    for unit in units_of(recipe, [plan.layer for plan in plans if plan.layer.expert is not None]):
        own = [name for name in unit if name in names]
        if 0 < len(own) < len(unit):
            raise PlanError(
                f"{own[0]}: format {recipe.serializer.name} has one type for all {len(unit)} experts of a stack, and "
                f"of these only {len(own)} are left to measurement"
            )


def matching(names: Sequence[str]) -> re.Pattern[str]:
    """A pattern for exactly these names; those that differ in their last number alone share one alternative."""
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        parts = re.fullmatch(r"(.*?)(\d*)(\D*)", name)
        assert parts
        numbers[re.escape(parts[1]), re.escape(parts[3])].append(parts[2])
    return re.compile("|".join(f"{before}({'|'.join(own)}){after}" for (before, after), own in numbers.items()))


def stored_as(plan: LayerPlan) -> tuple[int, str, str]:
    """The part of a plan that a budget decides, to compare plans by."""
    return plan.scheme.bits, plan.scheme.type or "", plan.scheme.grouper.model_dump_json()
