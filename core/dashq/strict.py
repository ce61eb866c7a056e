"""Pydantic models that refuse unknown keys, naming the allowed ones and the nearest guess."""

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Strict(BaseModel):
    """An immutable record in which a misspelt key is an error that says what was possible.

    `renamed_keys` are keys of earlier versions and their names now: an error that says so.
    """

    renamed_keys: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any, build: Any) -> Self:
        if isinstance(data, Mapping):
            unknown = [key for key in data if key not in cls.model_fields]
            if unknown:
                errors = [mistake(str(key), cls._refusal(str(key)), data[key]) for key in unknown]
                raise ValidationError.from_exception_data(cls.__name__, errors)
        result: Self = build(data)
        return result

    @classmethod
    def _refusal(cls, key: str) -> str:
        if key in cls.renamed_keys:
            return f"unknown key {key!r}: it is called {cls.renamed_keys[key]} now"
        allowed = list(cls.model_fields)
        return f"unknown key {key!r}.{guess(key, allowed)} Allowed here: {', '.join(allowed) or 'no keys at all'}"


def guess(word: str, choices: list[str]) -> str:
    """` Did you mean 'x'?`, or nothing when no choice is near."""
    near = difflib.get_close_matches(word, choices, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def mistake(key: str, message: str, value: Any) -> InitErrorDetails:
    """An error of validation at the entry `key`, in words of our own."""
    # Braces in the words would be read as a template.
    error = PydanticCustomError("in_our_words", "{message}", {"message": message})
    return InitErrorDetails(type=error, loc=(key,), input=value)
