"""Resolve a recipe against a model's layers, and refuse whatever can be refused before a weight is read."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from dashq.curvature import Curvature
from dashq.data import Grid, Layer, Role, StoredLayer, size_of
from dashq.errors import PlanError
from dashq.recipe.recipe import Outside, Override, Recipe, Scheme
from dashq.registry import Registry
from dashq.strategies import Serializer, Solver, Strategy

# The last parts of the names of neighbouring layers that runtimes fuse into one.
FUSED_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

MOST_REASONS = 8  # in one message: each is advised about, and nobody reads more


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The decisions about one layer, taken before a weight is read.

    `rule` names the parts of the recipe that had a say, as in `override 1+3`; `size` is that of its groups in columns,
    and `bytes` are those of its codes, scales and offsets on disk.
    """

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
        """The record of the layer in the checkpoint to be."""
        return StoredLayer(layer=self.layer, grid=self.grid, size=self.size, ordered=self.scheme.grouper.reorders)


class FormatRefusal(PlanError):
    """A format cannot hold a layer as the recipe wants it; `advised` names the formats that can."""

    def __init__(self, reason: str, layer: Layer, bits: int, size: int, ordered: bool) -> None:
        super().__init__(reason)
        self.layer, self.bits, self.size, self.ordered = layer, bits, size, ordered


def make_plan(
    recipe: Recipe, layers: Sequence[Layer], unclear: Mapping[str, str] | None = None
) -> tuple[LayerPlan, ...]:
    """One plan for each layer that is not skipped, in their order; embeddings and head only where the recipe asks.

    `unclear` are weights that look like experts and that no layer stands for, by name, with what they are. Raises
    `PlanError` with the reasons why layers cannot be planned, a line for each, at most `MOST_REASONS`.
    """
    _check_outside(recipe, layers)
    _check_overrides(recipe, layers, unclear or {})
    refusals: dict[str, PlanError] = {}  # the first for each reason
    refused: dict[str, list[str]] = defaultdict(list)
    for name, what in (unclear or {}).items():
        if not scheme_of(recipe, name)[0].skip:
            reason = (
                f"{what}, which cannot be quantized; "
                "to leave such weights as they are, add an override that matches them with `skip: true`"
            )
            refusals[reason] = PlanError(reason)
            refused[reason].append(name)
    plans = []
    outcomes: dict[Hashable, LayerPlan | PlanError] = {}
    for layer in layers:
        scheme, rule = scheme_of(recipe, layer.name, layer.role)
        if scheme.skip:
            continue
        kind = kind_of(layer, rule)
        if kind not in outcomes:
            outcomes[kind] = _plan_or_refusal(recipe, layer, scheme, rule)
        outcome = outcomes[kind]
        if isinstance(outcome, PlanError):
            refusals.setdefault(str(outcome), outcome)
            refused[str(outcome)].append(layer.name)
        else:
            plans.append(replace(outcome, layer=layer))
    if refusals:
        lines = [
            f"{in_short(refused[reason])}: {advised(refusals[reason], recipe.registry)}"
            for reason in list(refusals)[:MOST_REASONS]
        ]
        if others := list(refusals)[MOST_REASONS:]:
            lines.append(f"and {sum(len(refused[reason]) for reason in others)} layers for {len(others)} other reasons")
        raise PlanError("\n".join(lines))
    if not plans:
        inside = sum(layer.role == "linear" for layer in layers)
        raise PlanError(f"every one of the {inside + len(unclear or {})} layers is skipped: nothing to quantize")
    recipe.serializer.check([plan.stored for plan in plans])
    return tuple(plans)


def plan_layer(recipe: Recipe, layer: Layer, scheme: Scheme, rule: str) -> LayerPlan:
    """The plan of one layer with a scheme that `rule` names.

    Raises `PlanError` with the reason why there is none; `advised` completes it where the format is the reason.
    """
    serializer, solver = recipe.serializer, scheme.solver
    needs: type[Curvature] = solver.needs
    produces: type[Curvature] = scheme.estimator.produces
    if not issubclass(produces, needs):
        able = ", ".join(name for name, cls in recipe.registry.estimators.items() if issubclass(cls.produces, needs))
        raise PlanError(
            f"solver {solver.name!r} needs {needs.__name__} curvature, but estimator {scheme.estimator.name!r} "
            f"produces {produces.__name__}. Estimators that fit: {able or 'none that is installed'}"
        )
    if layer.expert is not None and scheme.router is None:
        raise PlanError(
            "an expert of a mixture, and its scheme has no router to say which tokens count for it; "
            f"add `router:` with one of those installed: {', '.join(recipe.registry.routers) or 'none'}"
        )
    size = scheme.grouper.size_for(layer.columns)
    ordered = scheme.grouper.reorders
    try:
        grid = serializer.grid_of(scheme.bits, scheme.type)
        if scheme.type:  # the usual one has one name in plans: none
            scheme = scheme.model_copy(update={"type": serializer.name_of(grid)})
        size_on_disk = _packed_size(serializer, layer, grid, size, ordered)
    except PlanError as error:
        raise FormatRefusal(str(error), layer, scheme.bits, size, ordered) from error
    if grid.super_blocks and not solver.supports_super_blocks:
        able = ", ".join(name for name, cls in recipe.registry.solvers.items() if _solves(cls, produces, size, grid))
        raise PlanError(
            f"solver {solver.name!r} cannot work where scales are multiples of a super-block's unit, as at "
            f"{scheme.bits} bits of format {serializer.name!r}. Solvers that can: {able or 'none that is installed'}"
        )
    if grid.codebook and not solver.supports_codebooks:
        able = ", ".join(name for name, cls in recipe.registry.solvers.items() if _solves(cls, produces, size, grid))
        raise PlanError(
            f"solver {solver.name!r} cannot work where codes stand for the levels of a codebook, as at {scheme.bits} "
            f"bits of format {serializer.name!r}. Solvers that can: {able or 'none that is installed'}"
        )
    try:
        solver.check(size, grid)
    except PlanError as error:
        able = ", ".join(name for name, cls in recipe.registry.solvers.items() if _solves(cls, produces, size, grid))
        raise PlanError(f"{error}. Solvers that can: {able or 'none that is installed'}") from error
    return LayerPlan(layer=layer, scheme=scheme, rule=rule, size=size, grid=grid, bytes=size_on_disk)


def kind_of(layer: Layer, rule: str) -> Hashable:
    """A key that layers have in common where they are planned alike: a mixture has thousands of them."""
    return rule, layer.rows, layer.columns, layer.expert is None, layer.role


def scheme_of(recipe: Recipe, name: str, role: Role = "linear") -> tuple[Scheme, str]:
    """The scheme of the layer of that name, and the parts of the recipe that have a say in it."""
    overrides = overrides_for(recipe, name)
    scheme = recipe.scheme
    for _, override in overrides:
        scheme = override.apply(scheme)
    rule = "override " + "+".join(str(number) for number, _ in overrides) if overrides else "scheme"
    if role == "linear":
        return scheme, rule
    key, entry = outside_entry(recipe, role)
    if entry is None:
        return scheme.model_copy(update={"skip": True}), rule
    return entry.apply(scheme), f"{rule}+{key}" if overrides else key


def outside_entry(recipe: Recipe, role: Role) -> tuple[str, Outside | None]:
    """The recipe's key for a layer outside of the blocks, and its entry; one matrix that is both has either."""
    if role == "head" or (role == "tied" and recipe.embeddings is None):
        return "head", recipe.head
    return "embeddings", recipe.embeddings


def is_decided(recipe: Recipe, layer: Layer) -> bool:
    """True where an override, or an entry for embeddings or head, decides the layer's bits, type or groups.

    Of layers whose losses are not measured the scheme does, where nothing else says so.
    """
    if layer.role == "per_layer":
        return True
    deciding: list[Override | Outside | None] = [override for _, override in overrides_for(recipe, layer.name)]
    if layer.role != "linear":
        deciding.append(outside_entry(recipe, layer.role)[1])
    return any(entry.bits or entry.type or entry.grouper for entry in deciding if entry)


def measurable(plans: Iterable[LayerPlan]) -> list[LayerPlan]:
    """The plans of layers whose losses are measured: no gradient is taken by parts of rows that blocks are given."""
    return [plan for plan in plans if plan.layer.role != "per_layer"]


def overrides_for(recipe: Recipe, name: str) -> list[tuple[int, Override]]:
    """The overrides for the layer of that name, counted from 1, but those that wait for a measurement."""
    return [
        (number, override)
        for number, override in enumerate(recipe.overrides, start=1)
        if not override.critical and override.matches(name)
    ]


def refuse_layer(layer: Layer, serializer: Serializer) -> None:
    """Raise a `PlanError` where the format's programs could not read experts, embeddings or the head as this one is."""
    if layer.expert is not None and not serializer.holds_experts:
        raise PlanError(f"format {serializer.name} cannot hold experts of a mixture, which its programs keep otherwise")
    if layer.role == "tied" and not (serializer.holds_embeddings and serializer.holds_head):
        raise PlanError(f"format {serializer.name} cannot hold one matrix that is both embeddings and head")
    if layer.is_looked_up and not serializer.holds_embeddings:
        raise PlanError(f"format {serializer.name} cannot hold embeddings, which its programs do not read packed")
    if layer.role == "head" and not serializer.holds_head:
        raise PlanError(f"format {serializer.name} cannot hold the head, which its programs do not read packed")


def advised(refusal: PlanError, registry: Registry) -> str:
    """The reason of a refusal; where it is the format's, also the formats that hold such a layer with their defaults.

    This tries every format of the registry, which takes longer than a plan: it is called once for each reason shown.
    """
    if not isinstance(refusal, FormatRefusal):
        return str(refusal)
    able = [serializer.name for serializer in default_serializers(registry) if _holds(serializer, refusal)]
    return f"{refusal}. Formats that can hold such a layer: {', '.join(able) or 'none that is installed'}"


def default_serializers(registry: Registry) -> list[Serializer]:
    """Every format of the registry that can do without parameters, with its defaults."""
    return [cls() for cls in registry.serializers.values() if has_defaults(cls)]


def has_defaults(cls: type[Strategy]) -> bool:
    """True where a strategy can do without parameters."""
    return all(not field.is_required() for field in cls.model_fields.values())


def fused_with(name: str) -> list[str]:
    """The layers that runtimes compute as one with the layer of that name, itself among them, in a fixed order."""
    for ends in FUSED_LAYERS:
        for end in ends:
            if name.endswith(end):
                return [name.removesuffix(end) + other for other in ends]
    return [name]


def differing_neighbours(plans: Sequence[LayerPlan]) -> list[str]:
    """A sentence for each set of layers that runtimes fuse into one and that are not quantized alike."""
    stored = {plan.layer.name: f"{plan.grid.bits} bits in groups of {plan.size}" for plan in plans}
    sentences = []
    for ends in FUSED_LAYERS:
        for name in stored:
            if name.endswith(ends[0]):
                states = {other: stored.get(other, "unquantized") for other in fused_with(name)}
                if len(set(states.values())) > 1:
                    listed = ", ".join(f"{other} {state}" for other, state in states.items())
                    sentences.append(f"runtimes that fuse these layers want them quantized alike: {listed}")
    return sentences


def destroying_grids(plans: Sequence[LayerPlan]) -> list[str]:
    """A sentence where layers have a grid that no solver has been seen to save a model on."""
    grids = {plan.layer.name: plan.grid for plan in plans}
    names = [name for name, grid in grids.items() if grid.bits <= 2 and grid.zero == "symmetric" and not grid.codebook]
    if not names:
        return []
    return [
        f"{in_short(names)}: symmetric zeros at 2 bits leave weights one level above zero, which destroys most "
        "models; a format with whole or real zeros, or 3 bits, does not"
    ]


def _check_outside(recipe: Recipe, layers: Sequence[Layer]) -> None:
    """Refuse entries for embeddings and head that the model has not, and two for one matrix."""
    names = {layer.role: layer.name for layer in layers}
    for key, entry in (("embeddings", recipe.embeddings), ("head", recipe.head)):
        if entry and not {key, "tied"} & names.keys():
            raise PlanError(f"{key}: this model has none that can be quantized: it is no plain matrix of its own")
    if "tied" in names and recipe.embeddings and recipe.head and recipe.embeddings != recipe.head:
        raise PlanError(
            f"embeddings and head are one matrix in this model, {names['tied']}: say what to do with it under "
            "`embeddings` or under `head`, not in two ways"
        )


def _check_overrides(recipe: Recipe, layers: Sequence[Layer], unclear: Mapping[str, str]) -> None:
    """Refuse an override that matches nothing."""
    kept = [layer for layer in layers if layer.role != "linear" and outside_entry(recipe, layer.role)[1] is None]
    names = [layer.name for layer in layers if layer not in kept] + list(unclear)
    last_expert = max((layer.expert for layer in layers if layer.expert is not None), default=None)
    for number, override in enumerate(recipe.overrides, start=1):
        if override.match and not any(override.matches(name) for name in names):
            for layer in kept:
                if override.matches(layer.name):
                    raise PlanError(
                        f"override {number} ({override.match.pattern!r}): {layer.name} is quantized only where the "
                        f"recipe has an entry `{outside_entry(recipe, layer.role)[0]}`"
                    )
            numbered = (
                f"The experts of a mixture are numbered 0 to {last_expert}; routers are never quantized. "
                if last_expert is not None
                else ""
            )
            raise PlanError(
                f"override {number} ({override.match.pattern!r}) matches no layer; a match is for the whole name. "
                f"{numbered}The first layers are: {', '.join(names[:8])}"
            )


def _plan_or_refusal(recipe: Recipe, layer: Layer, scheme: Scheme, rule: str) -> LayerPlan | PlanError:
    try:
        return plan_layer(recipe, layer, scheme, rule)
    except PlanError as error:
        return error


def _packed_size(serializer: Serializer, layer: Layer, grid: Grid, size: int, ordered: bool) -> int:
    """The bytes that a layer takes in this format, from packing it without values."""
    refuse_layer(layer, serializer)
    packed = serializer.pack(StoredLayer(layer=layer, grid=grid, size=size, ordered=ordered).empty())
    return size_of(packed.values())


def _solves(cls: type[Solver], produces: type[Curvature], size: int, grid: Grid) -> bool:
    """True where a solver with its defaults takes groups of `size` on `grid`, with curvature as the estimator's."""
    if not (issubclass(produces, cls.needs) and has_defaults(cls)):
        return False
    if (grid.super_blocks and not cls.supports_super_blocks) or (grid.codebook and not cls.supports_codebooks):
        return False
    try:
        cls().check(size, grid)
    except PlanError:
        return False
    return True


def _holds(serializer: Serializer, wanted: FormatRefusal) -> bool:
    try:
        _packed_size(serializer, wanted.layer, serializer.grid(wanted.bits), wanted.size, wanted.ordered)
    except PlanError:
        return False
    return True


def in_short(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
