"""Turn what a recipe leaves to measurement into plain overrides: critical layers, and bits within a budget."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product

from dashq.data import Layer
from dashq.errors import PlanError
from dashq.measuring.allocation import Option, allocate
from dashq.measuring.sensitivity import Analysis, Choices, LayerAnalysis, analyze
from dashq.model.decoder import Model
from dashq.recipe.plan import LayerPlan, applying, fused, make_plan, plan_layer
from dashq.recipe.recipe import Critical, Override, Recipe
from dashq.results.events import Listener
from dashq.results.folder import check_folder
from dashq.results.report import Selection
from dashq.strategies import Grouper

USUAL_BITS = (2, 3, 4)
EVERY_NAME = re.compile(".*")


def decide(recipe: Recipe, model: Model, listen: Listener, overwrite: bool) -> tuple[Recipe, tuple[Selection, ...]]:
    """The recipe with nothing left to measure, and what was chosen.

    Measures first, unless the output folder holds what was measured for this recipe before. Raises a `DashqError`
    before any weight is read where the recipe, the model or the folder does not allow it.
    """
    choices = choices_for(recipe, model)
    check_folder(recipe.output, overwrite)
    analysis = stored(recipe, choices)
    if analysis is None:
        analysis = analyze(recipe, model, choices, listen)
        analysis.save(recipe.output)
    return settle(recipe, model.layers(), analysis)


def stored(recipe: Recipe, choices: Choices) -> Analysis | None:
    """What an earlier measurement left in the output folder, if it answers for these choices."""
    analysis = Analysis.load(recipe.output)
    return analysis if analysis and analysis.fits(recipe, choices) else None


def choices_for(recipe: Recipe, model: Model, bits: Sequence[int] = ()) -> dict[str, list[LayerPlan]]:
    """What there is to measure of each layer: what its scheme says, then what the budget offers, and further `bits`.

    Raises `PlanError` for whatever can be refused without a measurement.
    """
    layers = model.layers()
    make_plan(_all_critical(recipe), layers, model.unclear_weights())
    plans = make_plan(recipe, layers, model.unclear_weights())
    for number, override in enumerate(recipe.overrides, start=1):
        if override.critical and not any(override.matches(plan.layer.name) for plan in plans):
            raise PlanError(f"override {number}: no layer is left to choose critical ones from: all are skipped")
    choices = {plan.layer.name: [plan] for plan in plans}
    if recipe.budget:
        offered = _offered(recipe, plans)
        _check_budget(recipe, plans, offered)
        for name, others in offered.items():
            choices[name] += others
    for plan in plans:
        choices[plan.layer.name] += _plans(plan, bits, (), recipe, {})
    return {name: list({_label(plan): plan for plan in mine}.values()) for name, mine in choices.items()}


def settle(recipe: Recipe, layers: Sequence[Layer], analysis: Analysis) -> tuple[Recipe, tuple[Selection, ...]]:
    """The recipe with measured choices in the place of those that were left to measurement, and what was chosen."""
    plans = {plan.layer.name: plan for plan in make_plan(recipe, layers)}
    overrides, selections = [], []
    for number, override in enumerate(recipe.overrides, start=1):
        if override.critical:
            critical = tuple(_critical(recipe, override, override.critical, plans, analysis.by_name))
            share = sum(plans[name].layer.weights for name in critical) / sum(
                plan.layer.weights for plan in plans.values()
            )
            what = f"override {number}: critical by {override.critical.by}, {share:.1%} of the weights"
            selections.append(Selection(what, critical))
            override = override.model_copy(update={"match": matching(critical), "critical": None})
        overrides.append(override)
    settled = recipe.model_copy(update={"overrides": tuple(overrides)})
    if recipe.budget:
        for alike in _within_budget(settled, layers, analysis.by_name):
            names, scheme = tuple(plan.layer.name for plan in alike), alike[0].scheme
            sizes = " or ".join(map(str, sorted({plan.size for plan in alike})))
            selections.append(Selection(f"budget: {scheme.bits} bits in groups of {sizes}", names))
            grouper = scheme.grouper if recipe.budget.groupers else None
            overrides.append(Override(match=matching(names), bits=scheme.bits, grouper=grouper))
        settled = settled.model_copy(update={"overrides": tuple(overrides), "budget": None})
    return settled, tuple(selections)


def matching(names: Sequence[str]) -> re.Pattern[str]:
    """A pattern for exactly these names; those that differ in their last number alone share one."""
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        found = re.fullmatch(r"(.*?)(\d*)(\D*)", name)
        assert found
        numbers[re.escape(found[1]), re.escape(found[3])].append(found[2])
    ways = [f"{before}({'|'.join(some)}){after}" for (before, after), some in numbers.items()]
    return re.compile("|".join(ways))


def _all_critical(recipe: Recipe) -> Recipe:
    """As if every layer that could be chosen were, so that what one of them cannot be is refused in time."""
    plain = {"critical": None, "skip": None}  # some can be left as they are, where all cannot
    overrides = [
        o.model_copy(update={"match": o.match or EVERY_NAME, **plain}) if o.critical else o for o in recipe.overrides
    ]
    return recipe.model_copy(update={"overrides": tuple(overrides)})


def _critical(
    recipe: Recipe,
    override: Override,
    critical: Critical,
    plans: Mapping[str, LayerPlan],
    measured: Mapping[str, LayerAnalysis],
) -> list[str]:
    """The layers with the highest figures, those that are fused together, as many as fit into the share of weights."""
    units = [
        mine for unit in _units(recipe, list(plans)) if (mine := [name for name in unit if override.matches(name)])
    ]
    weights = [sum(plans[name].layer.weights for name in unit) for unit in units]

    def figure(index: int) -> float:
        values = (plans[n].layer.weights * _figure(critical.by, measured[n], plans[n]) for n in units[index])
        return sum(values) / weights[index]

    chosen: set[str] = set()
    room = critical.share * sum(weights)
    for index in sorted(range(len(units)), key=figure, reverse=True):
        if weights[index] <= room or not chosen:
            chosen |= set(units[index])
            room -= weights[index]
    return [name for name in plans if name in chosen]


def _figure(by: str, layer: LayerAnalysis, plan: LayerPlan) -> float:
    """How critical a layer is: for the sensitivity by weight, since it is weights that cost bits."""
    choice, noise = layer.choice(plan), layer.signal_to_noise
    assert choice
    median = noise.off_diagonal[len(noise.off_diagonal) // 2] if noise else 0.0
    return {"sensitivity": choice.sensitivity / plan.layer.weights, "error": choice.error, "snr": median}[by]


def _within_budget(
    recipe: Recipe, layers: Sequence[Layer], measured: Mapping[str, LayerAnalysis]
) -> Iterator[list[LayerPlan]]:
    """The plans that cost least within the budget, alike ones together, of the layers that it decides about."""
    assert recipe.budget
    plans = make_plan(recipe, layers)
    offered = _offered(recipe, plans)
    ways = [_ways(unit, offered) for unit in _units(recipe, list(offered))]

    def cost(plan: LayerPlan) -> float:
        choice = measured[plan.layer.name].choice(plan)
        assert choice
        return choice.sensitivity

    options = [[Option(sum(p.bytes for p in way), sum(map(cost, way))) for way in unit] for unit in ways]
    picked = allocate(options, _budget_bytes(recipe, plans, offered))
    alike: dict[tuple[int, str], list[LayerPlan]] = defaultdict(list)
    for unit, index in zip(ways, picked, strict=True):
        for plan in unit[index]:
            alike[_label(plan)].append(plan)
    for label in sorted(alike):
        yield alike[label]


def _offered(recipe: Recipe, plans: Sequence[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """What the budget offers each layer; those whose bits or groups an override decides are left out."""
    budget = recipe.budget
    assert budget
    offered: dict[str, list[LayerPlan]] = {}
    refused: dict[int, str] = {}
    for plan in plans:
        name = plan.layer.name
        if not any(override.bits or override.grouper for _, override in applying(recipe, name)):
            offered[name] = _plans(plan, budget.bits or USUAL_BITS, budget.groupers, recipe, refused)
            if not offered[name]:
                raise PlanError(f"{name}: nothing that the budget offers is possible: {[*refused.values()][-1]}")
    used = {plan.scheme.bits for ways in offered.values() for plan in ways}
    for bits in budget.bits:
        if offered and bits not in used:
            raise PlanError(f"budget: no layer can have {bits} bits: {refused[bits]}")
    return offered


def _plans(
    plan: LayerPlan, bits: Sequence[int], groupers: Sequence[Grouper], recipe: Recipe, refused: dict[int, str]
) -> list[LayerPlan]:
    """The layer with each of these bits and groups that are possible; of the others the reason."""
    found = []
    for some_bits, grouper in product(bits, groupers or (plan.scheme.grouper,)):
        scheme = plan.scheme.model_copy(update={"bits": some_bits, "grouper": grouper})
        try:
            found.append(plan_layer(plan.layer, scheme, "budget", recipe.serializer))
        except PlanError as error:
            refused[some_bits] = str(error)
    return found


def _check_budget(recipe: Recipe, plans: Sequence[LayerPlan], offered: Mapping[str, Sequence[LayerPlan]]) -> None:
    """Refuse a budget that cannot be met, or a format in which layers cannot differ."""
    assert recipe.budget
    weights, asked = sum(plan.layer.weights for plan in plans), recipe.budget.bits_per_weight
    least = sum(min(plan.bytes for plan in ways) for ways in offered.values())
    missing = least - _budget_bytes(recipe, plans, offered)
    if missing > 0:
        least_bits = asked + 8 * missing / weights
        raise PlanError(f"budget: {asked} bits per weight cannot be met: the least possible is {least_bits:.4g}")
    *_, (first, *_) = ways = list(offered.values()) or [list(plans)]
    recipe.serializer.check([first.stored, *(mine[-1].stored for mine in ways[:-1])])


def _budget_bytes(recipe: Recipe, plans: Sequence[LayerPlan], offered: Collection[str]) -> int:
    """What the budget leaves to the layers that it can decide about."""
    assert recipe.budget
    fixed = sum(plan.bytes for plan in plans if plan.layer.name not in offered)
    return int(recipe.budget.bits_per_weight * sum(plan.layer.weights for plan in plans) / 8) - fixed


def _ways(unit: Sequence[str], offered: Mapping[str, Sequence[LayerPlan]]) -> list[list[LayerPlan]]:
    """How the layers of a unit can be stored alike."""
    by_label = [{_label(plan): plan for plan in offered[name]} for name in unit]
    ways = [[mine[label] for mine in by_label] for label in by_label[0] if all(label in mine for mine in by_label)]
    if not ways:
        raise PlanError(f"{', '.join(unit)}: runtimes fuse these layers, and the budget offers nothing that all can be")
    return ways


def _units(recipe: Recipe, names: Sequence[str]) -> list[list[str]]:
    """The layers that are decided about together: those that the format's runtimes fuse, else each alone."""
    together: dict[str, list[str]] = defaultdict(list)
    for name in names:
        together[fused(name)[0] if recipe.serializer.runtimes_fuse_layers else name].append(name)
    return list(together.values())


def _label(plan: LayerPlan) -> tuple[int, str]:
    return plan.scheme.bits, plan.scheme.grouper.model_dump_json()
