"""The recipe: what a user asks for, as written in YAML."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from dashq.errors import OutputError, RecipeError
from dashq.recipe.patterns import compiled
from dashq.recipe.yaml_text import Document, read_value
from dashq.registry import Registry, installed_registry
from dashq.strategies import Estimator, Grouper, Router, Serializer, Solver, Strategy, Tuner
from dashq.strict import Strict, as_tuple, guess, mistake, shown
from dashq.text_source import Sources

S = TypeVar("S", bound=Strategy)


def _from_registry(kind: str) -> BeforeValidator:
    """Accept `diagonal` or `{name: diagonal, ...}` and look the name up among the installed plugins."""

    def build(value: Any, info: ValidationInfo) -> Any:
        if value is None or isinstance(value, Strategy):
            return value
        choices: Mapping[str, type[Strategy]] = getattr(info.context, kind)
        if not isinstance(value, str | Mapping):
            raise ValueError(f"should be a name or a mapping with a `name`, not {shown(value)}")
        fields = {"name": value} if isinstance(value, str) else dict(value)
        name = fields.pop("name", None)
        if name is None:
            raise ValueError(f"a `name` is missing. Installed: {', '.join(choices)}")
        if not isinstance(name, str) or name not in choices:
            near = guess(str(name), list(choices))
            word = "format" if kind == "serializers" else kind.removesuffix("s")
            message = f"no {word} named {shown(name)}.{near} Installed: {', '.join(choices)}"
            raise ValidationError.from_exception_data(kind, [mistake("name", message, name)])
        return choices[name].model_validate(fields)

    return BeforeValidator(build)


def _as_budget(value: Any) -> Any:
    if not isinstance(value, int | float | str | Mapping | Budget | None):
        possible = "a number of bits per weight, or a mapping with `bits_per_weight`"
        raise ValueError(f"should be {possible}, not {shown(value)}")
    return {"bits_per_weight": value} if isinstance(value, int | float | str) else value


def _possible(path: str) -> str:
    """The path as it is, where there can be one of that name at all."""
    try:
        os.lstat(path)
    except ValueError as error:  # a NUL in it
        raise ValueError(f"{shown(path)} can be no path: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{shown(path)} can be no path: {error.strerror}") from error
    return path


def expanded(path: Path) -> Path:
    """The output with `~` as the user's home; an `OutputError` where there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise OutputError(f"the output {path}: {error}") from error


def _device(name: str) -> str:
    """The name as it is, where a device could have it; whether there is one, `choose_device` knows."""
    if not re.fullmatch(r"auto|(cpu|cuda)(:\d+)?", name):
        raise ValueError(f"should be auto, cpu, cuda or cuda:N, not {shown(name)}")
    return name


def _auto_or_truth(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"should be auto, true or false, not {shown(value)}")
    return value


def _as_pattern(value: Any) -> Any:
    return compiled(value) if isinstance(value, str) else value


AnyEstimator = Annotated[SerializeAsAny[Estimator], _from_registry("estimators")]
AnyGrouper = Annotated[SerializeAsAny[Grouper], _from_registry("groupers")]
AnySolver = Annotated[SerializeAsAny[Solver], _from_registry("solvers")]
AnyRouter = Annotated[SerializeAsAny[Router], _from_registry("routers")]
AnyTuner = Annotated[SerializeAsAny[Tuner], _from_registry("tuners")]
AnySerializer = Annotated[SerializeAsAny[Serializer], _from_registry("serializers")]
Bits = Annotated[int, Field(ge=1, le=8)]
Beginning = Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_truth)]
PoolingTokens = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Calibration(Strict):
    """The text that flows through the model, and whether it sees quantized blocks on the way.

    `beginning` says whether each sample begins with the token for that; `auto` does as the tokenizer does with texts.
    `error_correction` is the share of what quantized layers change about a layer's inputs that its weights undo.
    Samples are cut into as many `shares` at most; so many processes can take part in a run. What calibration learns is
    kept in the folder `keep`, for runs that would learn the same.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "tokens": "sequence_length",
        "prefix_correction": "error_correction",
    }

    dataset: Sources
    samples: PositiveInt = 128
    sequence_length: PositiveInt = 2048
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0  # as torch takes them
    packing: bool = True
    beginning: Beginning = "auto"
    propagate: Literal["original", "quantized", "sequential"] = "original"
    error_correction: Annotated[float, Field(ge=0, le=1)] = 0.0
    shares: PositiveInt = 8
    keep: Annotated[Path, AfterValidator(_possible), AfterValidator(expanded)] | None = None

    @model_validator(mode="after")
    def _keeps_what_nothing_changes(self) -> Self:
        if self.keep and self.propagate != "original":
            raise ValueError(
                f"`keep` is for what depends on nothing that is quantized, and with `propagate: {self.propagate}` each "
                "block is calibrated behind quantized ones: leave `keep` out, or use `propagate: original`"
            )
        return self

    @property
    def corrects(self) -> bool:
        """True where layers undo what quantized ones before them change: never where all see the original's outputs."""
        return self.propagate != "original" and self.error_correction > 0


class Scheme(Strict):
    """The way to quantize one layer. `router` and `pooling_tokens` matter only inside a mixture of experts.

    `type` is one of the format's own at these bits, where it has several; None for the usual one.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {"pooling": "pooling_tokens"}

    bits: Bits
    type: str | None = None
    estimator: AnyEstimator
    grouper: AnyGrouper
    solver: AnySolver
    router: AnyRouter | None = None
    pooling_tokens: PoolingTokens = 64.0
    skip: bool = False


class Critical(Strict):
    """The layers that a measurement finds most critical, as many as hold a `share` of the weights."""

    share: Annotated[float, Field(gt=0, lt=1)]
    by: Literal["sensitivity", "error", "snr"] = "sensitivity"


class Budget(Strict):
    """The bits that a weight may take on average, with scales and offsets, and what each layer can be given.

    Without `bits`, those of 2, 3 and 4 that the format holds; without `types`, all that it has at these bits; without
    `groupers`, each layer keeps its own.
    """

    bits_per_weight: Annotated[PositiveFloat, Field(allow_inf_nan=False)]
    bits: Annotated[tuple[Bits, ...], BeforeValidator(as_tuple, Bits | list[Bits])] = ()
    types: Annotated[tuple[str, ...], BeforeValidator(as_tuple, str | list[str])] = ()
    groupers: Annotated[tuple[AnyGrouper, ...], BeforeValidator(as_tuple, AnyGrouper | list[AnyGrouper])] = ()


class Override(Strict):
    """Replaces whole entries of the scheme for some layers. Later overrides win.

    It is for the layers whose full name `match`es; with `critical`, for the most critical of these.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = Scheme.renamed_keys

    match: Annotated[re.Pattern[str] | None, BeforeValidator(_as_pattern)] = None
    critical: Critical | None = None
    bits: Bits | None = None
    type: str | None = None
    estimator: AnyEstimator | None = None
    grouper: AnyGrouper | None = None
    solver: AnySolver | None = None
    router: AnyRouter | None = None
    pooling_tokens: PoolingTokens | None = None
    skip: bool | None = None

    @model_validator(mode="after")
    def _for_some_layers(self) -> Self:
        if self.match is None and self.critical is None:
            raise ValueError("an override needs `match`, `critical` or both, to say which layers it is for")
        return self

    def matches(self, name: str) -> bool:
        """True where `match` lets the override apply to the layer of that name."""
        return self.match is None or self.match.fullmatch(name) is not None

    def apply(self, scheme: Scheme) -> Scheme:
        """The scheme with this override's entries in place of its own."""
        entries = {key: value for key, value in self if key not in ("match", "critical") and value is not None}
        return _replaced(scheme, entries)


class Outside(Strict):
    """Replaces whole entries of the scheme for the embeddings or for the head, which are quantized only where asked.

    Without `bits` they have those of the scheme, unless a budget decides. A head, and one matrix that is both, needs
    more where these are few: recipes for a program have at least 5.
    """

    bits: Bits | None = None
    type: str | None = None
    estimator: AnyEstimator | None = None
    grouper: AnyGrouper | None = None
    solver: AnySolver | None = None

    def apply(self, scheme: Scheme) -> Scheme:
        """The scheme with these entries in place of its own; `skip` is for layers inside blocks."""
        entries = {key: value for key, value in self if value is not None}
        return _replaced(scheme, {**entries, "skip": False})


def _replaced(scheme: Scheme, entries: Mapping[str, Any]) -> Scheme:
    """The scheme with other entries: a type goes with the bits that it is of."""
    without = {"type": None} if "bits" in entries else {}
    return scheme.model_copy(update={**without, **entries})


class Recipe(Strict):
    """One run: a model, a text, a scheme for every layer, a format, and a folder for the result.

    The result is compared with the global optimum on a random sample of about `certificate_groups` groups of weights.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {"certificate": "certificate_groups"}

    model: Annotated[str, AfterValidator(_possible)]
    output: Annotated[Path, AfterValidator(_possible), AfterValidator(expanded)]
    device: Annotated[str, AfterValidator(_device)] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    calibration: Calibration
    scheme: Scheme
    overrides: tuple[Override, ...] = ()
    embeddings: Outside | None = None
    head: Outside | None = None
    budget: Annotated[Budget | None, BeforeValidator(_as_budget, PositiveFloat | Budget | None)] = None
    tuner: AnyTuner | None = None
    serializer: AnySerializer
    certificate_groups: NonNegativeInt = 1024

    _registry: Registry | None = None
    _target: str | None = None
    _chosen: str = ""
    _kept: str = ""
    _keep: Path | None = None

    @model_validator(mode="after")
    def _keep_registry(self, info: ValidationInfo) -> Self:
        if isinstance(info.context, Registry):
            self._registry = info.context
        return self

    @property
    def registry(self) -> Registry:
        """The registry that the recipe was read with; where it was built from strategies, that of what is installed."""
        return self._registry or installed_registry()

    @property
    def target(self) -> str | None:
        """The name of the target that the recipe is for, where one is named."""
        return self._target

    @property
    def completed(self) -> str:
        """A sentence on what the recipe does not say itself and its target chose; empty where there is no target."""
        return f"for {self._target}: {self._chosen}" if self._target else ""

    @property
    def overruling(self) -> str:
        """A sentence on what the recipe says otherwise than its target would have it; empty where there is nothing."""
        return f"kept from the recipe, where {self._target} would have others: {self._kept}" if self._kept else ""

    def with_target(self, name: str, chosen: str, kept: str) -> Self:
        """The same recipe for the target of that name, with lists in words of what that chose, and what it did not."""
        recipe = self.model_copy()
        recipe._target, recipe._chosen, recipe._kept = name, chosen, kept
        return recipe

    @property
    def keep(self) -> Path | None:
        """The folder in which runs keep what calibration learned, as the recipe or a sweep names it."""
        return self._keep or self.calibration.keep

    def keeping(self, folder: Path) -> Self:
        """The same recipe for a run that keeps what calibration learns in a folder that it does not name itself."""
        recipe = self.model_copy()
        recipe._keep = folder
        return recipe

    @property
    def format_files(self) -> frozenset[str]:
        """The names of files that results of its format, or of any in its registry, can hold besides those of all."""
        formats = (type(self.serializer), *self.registry.serializers.values())
        return frozenset(file for cls in formats for file in cls.files)

    @property
    def measures(self) -> bool:
        """True where the plan of a layer depends on what is measured first."""
        return self.budget is not None or any(override.critical for override in self.overrides)


def validated(document: Document, registry: Registry) -> Recipe:
    """The recipe in a document, with strategies of `registry`, which goes with the recipe from here on.

    Raises `RecipeError`, one line for each mistake, naming file and line.
    """
    try:
        return Recipe.model_validate(document.data, context=registry)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(document, dict(mistake)) for mistake in error.errors())) from error


def read_serializer(text: str, registry: Registry) -> Serializer:
    """A format as the command line has it, a name or a mapping in YAML; a `RecipeError` for what is neither."""
    return _read_strategy(text, f"the format {text!r}", TypeAdapter[Serializer](AnySerializer), registry)


def read_tuner(text: str, registry: Registry) -> Tuner:
    """A tuner as the command line has it, a name or a mapping in YAML; a `RecipeError` for what is neither."""
    return _read_strategy(text, f"the tuner {text!r}", TypeAdapter[Tuner](AnyTuner), registry)


def _read_strategy(text: str, title: str, adapter: TypeAdapter[S], registry: Registry) -> S:
    try:
        return adapter.validate_python(read_value(text), context=registry)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{title} is not valid YAML") from error
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        place = "".join(f"{part}: " for part in first["loc"])
        raise RecipeError(message if place == "name: " else f"{title}: {place}{message}") from error


def _explain(document: Document, mistake: dict[str, Any]) -> str:
    location = tuple(part for part in mistake["loc"] if isinstance(part, str | int))
    key = ".".join(map(str, location))
    return f"{document.where(location)}: {key if key.isprintable() else shown(key)}: {mistake['msg']}"
