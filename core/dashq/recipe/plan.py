"""Resolve a recipe against a model's layers, and refuse whatever can be refused before a weight is read."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dashq.data import Curvature, Grid, Layer, StoredLayer, size_of
from dashq.errors import PlanError
from dashq.recipe.recipe import Override, Recipe, Scheme
from dashq.registry import load_registry
from dashq.strategies import Serializer

# What runtimes compute as one layer, by the ends of their names.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What will be done with one layer. `rule` names the parts of the recipe that had a say, as in `override 1+3`."""

    layer: Layer
    scheme: Scheme
    rule: str
    size: int
    grid: Grid
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, scales and offsets included."""
        return 8 * self.bytes / self.layer.weights

    @property
    def stored(self) -> StoredLayer:
        """How the layer will lie in the checkpoint."""
        return StoredLayer(layer=self.layer, grid=self.grid, size=self.size, ordered=self.scheme.grouper.reorders)


def make_plan(
    recipe: Recipe, layers: Sequence[Layer], unclear: Mapping[str, str] | None = None
) -> tuple[LayerPlan, ...]:
    """One plan for each layer that is not skipped; raises `PlanError` with every reason why it cannot be.

    `unclear` are weights that look like experts and that no layer stands for, by name, with what they are.
    """
    names = [layer.name for layer in layers] + list(unclear or {})
    experts = 1 + max((layer.expert for layer in layers if layer.expert is not None), default=-1)
    refusals: dict[str, list[str]] = defaultdict(list)
    for index, override in enumerate(recipe.overrides):
        if override.match and not any(override.matches(name) for name in names):
            raise PlanError(
                f"override {index + 1} ({override.match.pattern!r}) matches no layer; a match is for the whole name. "
                + (
                    f"The experts of a mixture are numbered 0 to {experts - 1}; routers are never quantized. "
                    if experts
                    else ""
                )
                + f"The first layers are: {', '.join(names[:8])}"
            )
    for name, reason in (unclear or {}).items():
        if not scheme_of(recipe, name)[0].skip:
            refusals[
                f"{reason}, which cannot be quantized; "
                "to leave such weights as they are, add an override that matches them with `skip: true`"
            ].append(name)
    plans = []
    for layer in layers:
        scheme, rule = scheme_of(recipe, layer.name)
        if scheme.skip:
            continue
        try:
            plans.append(plan_layer(layer, scheme, rule, recipe.serializer))
        except PlanError as error:
            refusals[str(error)].append(layer.name)
    if refusals:
        raise PlanError("\n".join(f"{some(names)}: {reason}" for reason, names in refusals.items()))
    if not plans:
        raise PlanError(f"every one of the {len(names)} layers is skipped: nothing to quantize")
    recipe.serializer.check([plan.stored for plan in plans])
    return tuple(plans)


def fused(name: str) -> list[str]:
    """What runtimes compute as one with the layer of that name, itself among them, in the order of `FUSED`."""
    for ends in FUSED:
        for end in ends:
            if name.endswith(end):
                return [name.removesuffix(end) + other for other in ends]
    return [name]


def differing_neighbours(plans: Sequence[LayerPlan]) -> list[str]:
    """Where layers that runtimes fuse into one are not quantized alike: a sentence for each."""
    schemes = {plan.layer.name: (plan.grid.bits, plan.size) for plan in plans}
    told = []
    for first, *rest in FUSED:
        for name in schemes:
            if not name.endswith(first):
                continue
            names = [name, *(name.removesuffix(first) + other for other in rest)]
            if len({schemes.get(one) for one in names}) > 1:
                said = ", ".join(
                    f"{one} {'{} bits in groups of {}'.format(*schemes[one]) if one in schemes else 'unquantized'}"
                    for one in names
                )
                told.append(f"runtimes that fuse these layers want them quantized alike: {said}")
    return told


def refuse_expert(layer: Layer, serializer: Serializer) -> None:
    """A `PlanError` where the layer is an expert of a mixture and the format's programs could not read it."""
    if layer.expert is not None and not serializer.holds_experts:
        raise PlanError(f"format {serializer.name} cannot hold experts of a mixture, which its programs keep otherwise")


def with_formats(error: PlanError, layer: Layer, bits: int, size: int, ordered: bool) -> str:
    """The reason, and the installed formats that can, with their defaults, hold a layer so quantized."""
    able = [
        name
        for name, cls in load_registry().serializers.items()
        if all(not field.is_required() for field in cls.model_fields.values())
        and _holds(cls(), layer, bits, size, ordered)
    ]
    return f"{error}. Formats that can hold such a layer: {', '.join(able) or 'none that is installed'}"


def _holds(serializer: Serializer, layer: Layer, bits: int, size: int, ordered: bool) -> bool:
    try:
        refuse_expert(layer, serializer)
        serializer.pack(StoredLayer(layer=layer, grid=serializer.grid(bits), size=size, ordered=ordered).empty())
    except PlanError:
        return False
    return True


def applying(recipe: Recipe, name: str) -> list[tuple[int, Override]]:
    """The overrides for the layer of that name, counted from 1, but those that wait for a measurement."""
    return [(number, o) for number, o in enumerate(recipe.overrides, start=1) if not o.critical and o.matches(name)]


def scheme_of(recipe: Recipe, name: str) -> tuple[Scheme, str]:
    """What the recipe says of the layer of that name, and which parts of it say so."""
    applied = applying(recipe, name)
    scheme = recipe.scheme
    for _, override in applied:
        scheme = override.apply(scheme)
    return scheme, "override " + "+".join(str(number) for number, _ in applied) if applied else "scheme"


def plan_layer(layer: Layer, scheme: Scheme, rule: str, serializer: Serializer) -> LayerPlan:
    """The plan of one layer, or a `PlanError` with the reason why there is none."""
    needs: type[Curvature] = scheme.solver.needs
    produces: type[Curvature] = scheme.estimator.produces
    if not issubclass(produces, needs):
        raise PlanError(
            f"solver {scheme.solver.name!r} needs {needs.__name__} curvature, "
            f"but estimator {scheme.estimator.name!r} produces {produces.__name__}"
        )
    if layer.expert is not None and scheme.router is None:
        raise PlanError(
            "an expert of a mixture, and its scheme has no router to say which tokens count for it; "
            "add one, such as `router: routed`"
        )
    size = scheme.grouper.size_for(layer.columns)
    ordered = scheme.grouper.reorders
    try:
        refuse_expert(layer, serializer)
        grid = serializer.grid(scheme.bits)
        packed = serializer.pack(StoredLayer(layer=layer, grid=grid, size=size, ordered=ordered).empty())
    except PlanError as error:
        raise PlanError(with_formats(error, layer, scheme.bits, size, ordered)) from error
    if grid.super_blocks and not scheme.solver.supports_super_blocks:
        able = ", ".join(name for name, solver in load_registry().solvers.items() if solver.supports_super_blocks)
        raise PlanError(
            f"solver {scheme.solver.name!r} cannot work where scales are multiples of a super-block's unit, as at "
            f"{scheme.bits} bits of format {serializer.name!r}. Solvers that can: {able or 'none that is installed'}"
        )
    scheme.solver.check(size, grid)
    return LayerPlan(layer=layer, scheme=scheme, rule=rule, size=size, grid=grid, bytes=size_of(packed.values()))


def some(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
