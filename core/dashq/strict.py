"""Pydantic models that refuse unknown keys and values of another type, in the words of YAML."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

_OURS = "in_our_words"
_NUMBERS_AND_TRUTH = {int, float, bool}
# The types for which a value of a type can stand; a text can also stand for whatever else is no number.
_FITTING: Mapping[type, set[Any]] = {bool: {bool}, int: {int, float}, float: {float}}
# The words for a type that was needed, by the first part of pydantic's name for the error.
_NEEDED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "mapping": "a mapping",
    "model": "a mapping",
    "pattern": "a regular expression",
}


class Strict(BaseModel):
    """An immutable record in which a misspelt key, or a value of another type, is an error that says what was possible.

    No text or truth value is taken for a number, and no number or text for a truth value. `renamed_keys` are keys of
    earlier versions and their names now: an error that says so.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, data: Any, build: Any) -> Self:
        """All mistakes together, each in words of our own."""
        unknown: list[InitErrorDetails] = []
        loose: list[InitErrorDetails] = []
        if isinstance(data, Mapping):
            fields = cls.model_fields
            unknown = [mistake(str(key), cls._refusal(str(key)), data[key]) for key in data if key not in fields]
            data = {key: value for key, value in data.items() if key in fields}
            loose = [error for key in data for error in _of_another_type(key, data[key], fields[key].annotation)]
        try:
            result: Self = build(data)
        except ValidationError as error:
            places = {detail.get("loc") for detail in loose}
            rest = [
                _in_our_words(mistake)
                for mistake in error.errors()
                # An entry may be missing because its key is misspelt.
                if mistake["loc"] not in places and not (unknown and mistake["type"] == "missing")
            ]
            raise ValidationError.from_exception_data(cls.__name__, [*unknown, *loose, *rest]) from error
        if unknown or loose:
            raise ValidationError.from_exception_data(cls.__name__, [*unknown, *loose])
        return result

    @classmethod
    def _refusal(cls, key: str) -> str:
        if key in cls.renamed_keys:
            return f"unknown key {key!r}: it is called {cls.renamed_keys[key]} now"
        allowed = list(cls.model_fields)
        return f"unknown key {key!r}.{guess(key, allowed)} Allowed here: {', '.join(allowed) or 'no keys at all'}"


def guess(word: str, choices: Sequence[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no choice is near."""
    near = difflib.get_close_matches(word, choices, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def mistake(key: str | int, message: str, value: Any, *deeper: str | int) -> InitErrorDetails:
    """An error of validation at the entry `key`, or `deeper` in it, in words of our own."""
    # Braces in the words would be read as a template.
    error = PydanticCustomError(_OURS, "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=(key, *deeper), input=value)


def first_mistake(error: ValidationError) -> str:
    """The first of the mistakes in one line, behind its place."""
    first = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))


def shown(value: object) -> str:
    """A value as YAML has it, and not all of a long one."""
    try:
        text = repr(str(value)) if isinstance(value, str | PurePath) else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = str(value)
    return text if len(text) <= 80 else f"{text[:80]} …"


def _of_another_type(key: str, value: Any, annotation: Any) -> Iterator[InitErrorDetails]:
    """The mistakes that pydantic would overlook: values that it turns into others of the field's type."""
    types = _types(annotation)
    needed = [_NEEDED[kind.__name__] for kind in (int, float, bool) if kind in types]
    if not needed or Any in types:
        return
    for item, place in [(item, (n,)) for n, item in enumerate(value)] if isinstance(value, list) else [(value, ())]:
        fitting = _FITTING.get(type(item), types - _NUMBERS_AND_TRUTH - {type(None)})
        if isinstance(item, bool | int | float | str) and not types & fitting:
            yield mistake(key, f"should be {needed[0]}, not {shown(item)}", item, *place)


def _types(annotation: Any) -> set[Any]:
    """The types that stand in an annotation; of a `Literal` those of its values."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return {type(part) for part in parts}
    if not parts:
        return {annotation} if isinstance(annotation, type) else set()
    return set().union(*map(_types, parts))


def _in_our_words(mistake: ErrorDetails) -> InitErrorDetails:
    kind, message = mistake["type"], mistake["msg"].removeprefix("Value error, ")
    needed = _NEEDED.get(kind.split("_")[0])
    if kind == "missing":
        message = "this entry is missing"
    elif kind not in (_OURS, "value_error"):
        message = f"should be {needed}" if needed else message.replace("Input should be", "should be")
        message += f", not {shown(mistake['input'])}"
    error = PydanticCustomError(_OURS, "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=mistake["loc"], input=mistake["input"])


def as_tuple(value: Any) -> Any:
    """The value, or a tuple of it alone where it is no sequence, for entries that take one or several."""
    return value if isinstance(value, list | tuple) else (value,)
