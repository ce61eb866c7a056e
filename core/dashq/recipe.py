"""The recipe: what a user asks for, as written in YAML."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
)

from dashq.errors import RecipeError
from dashq.registry import Registry
from dashq.strategies import Estimator, Grouper, Router, Serializer, Solver, Strategy
from dashq.strict import Strict, guess, mistake
from dashq.tokens import TextSource
from dashq.yaml_text import Document, apply_settings, parse


def _from_registry(kind: str) -> BeforeValidator:
    """Accept `diagonal` or `{name: diagonal, ...}` and look the name up among the installed plugins."""

    def build(value: Any, info: ValidationInfo) -> Any:
        if value is None or isinstance(value, Strategy):
            return value
        choices: Mapping[str, type[Strategy]] = getattr(info.context, kind)
        if not isinstance(value, str | Mapping):
            raise ValueError(f"expected a name or a mapping with a `name`, got {value!r}")
        fields = {"name": value} if isinstance(value, str) else dict(value)
        name = fields.pop("name", None)
        if name is None:
            raise ValueError(f"no `name` given. Installed {kind}: {', '.join(choices)}")
        if not isinstance(name, str) or name not in choices:
            near = guess(str(name), list(choices))
            message = f"no {kind.removesuffix('s')} named {name!r}.{near} Installed: {', '.join(choices)}"
            raise ValidationError.from_exception_data(kind, [mistake("name", message, name)])
        return choices[name].model_validate(fields)

    return BeforeValidator(build)


def _as_tuple(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


AnyEstimator = Annotated[SerializeAsAny[Estimator], _from_registry("estimators")]
AnyGrouper = Annotated[SerializeAsAny[Grouper], _from_registry("groupers")]
AnySolver = Annotated[SerializeAsAny[Solver], _from_registry("solvers")]
AnyRouter = Annotated[SerializeAsAny[Router], _from_registry("routers")]
AnySerializer = Annotated[SerializeAsAny[Serializer], _from_registry("serializers")]
Bits = Annotated[int, Field(ge=1, le=8)]
Pooling = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Calibration(Strict):
    """The text that flows through the model, and whether it sees quantized blocks on the way.

    `prefix_correction` is the share of what quantized layers change about a layer's inputs that its weights undo.
    """

    dataset: Annotated[tuple[TextSource, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
    samples: PositiveInt = 128
    tokens: PositiveInt = 2048
    seed: int = 0
    packing: bool = True
    propagate: Literal["original", "quantized", "sequential"] = "original"
    prefix_correction: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def corrects(self) -> bool:
        """Whether layers undo what quantized ones before them change: nothing, where all see the original's outputs."""
        return self.propagate != "original" and self.prefix_correction > 0


class Scheme(Strict):
    """How one layer is quantized. `router` and `pooling` matter only inside a mixture of experts."""

    bits: Bits
    estimator: AnyEstimator
    grouper: AnyGrouper
    solver: AnySolver
    router: AnyRouter | None = None
    pooling: Pooling = 64.0
    skip: bool = False


class Override(Strict):
    """Replaces whole entries of the scheme for the layers whose full name `match`es. Later overrides win."""

    match: re.Pattern[str]
    bits: Bits | None = None
    estimator: AnyEstimator | None = None
    grouper: AnyGrouper | None = None
    solver: AnySolver | None = None
    router: AnyRouter | None = None
    pooling: Pooling | None = None
    skip: bool | None = None

    def apply(self, scheme: Scheme) -> Scheme:
        """The scheme with this override's entries in place of its own."""
        given = {key: value for key, value in self if key != "match" and value is not None}
        return scheme.model_copy(update=given)


class Recipe(Strict):
    """One run: a model, a text, a scheme for every layer, a format, and a folder for the result.

    The result is compared with the global optimum on a random sample of about `certificate` groups of weights.
    """

    model: str
    output: Path
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trust_remote_code: bool = False
    calibration: Calibration
    scheme: Scheme
    overrides: tuple[Override, ...] = ()
    serializer: AnySerializer
    certificate: NonNegativeInt = 1024


def load_recipe(path: Path, registry: Registry, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with `settings` such as `scheme.bits=3` in place of what the file says.

    Raises `RecipeError`, one line for each mistake, naming file and line.
    """
    document = apply_settings(parse(path), settings)
    try:
        return Recipe.model_validate(document.data, context=registry)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(document, dict(mistake)) for mistake in error.errors())) from error


def _explain(document: Document, mistake: dict[str, Any]) -> str:
    location = tuple(part for part in mistake["loc"] if isinstance(part, str | int))
    message = mistake["msg"].removeprefix("Value error, ")
    if mistake["type"] == "missing":
        message = "this entry is missing"
    elif mistake["type"] not in ("in_our_words", "value_error"):
        message += f", not {mistake['input']!r}"
    return f"{document.where(location)}: {'.'.join(map(str, location))}: {message}"
