"""Shapes are checked once for arguments of the same types and shapes, in functions that take or return tensors."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import is_dataclass
from functools import cache, wraps
from typing import Any, TypeVar

import jaxtyping
from numpy import ndarray
from torch import Tensor

T = TypeVar("T", bound=Callable[..., Any])
jaxtyped = jaxtyping.jaxtyped


def jaxtyped_once(typechecker: Callable[[Any], Any]) -> Callable[[T], T]:
    """A decorator for functions and data classes, to be used in place of jaxtyping's.

    A check of the same types and shapes ends the same way each time, and repeating it would take half of the time of
    tests that run recipes. Functions without tensors are left to mypy.
    """

    def decorate(target: T) -> T:
        decorated: T = target
        if not inspect.isclass(target):
            decorated = _once(target, typechecker)
        elif is_dataclass(target) and "__init__" in vars(target):
            type.__setattr__(target, "__init__", _once(vars(target)["__init__"], typechecker))
        return decorated

    return decorate


def _once(function: Callable[..., Any], typechecker: Callable[[Any], Any]) -> Any:
    if not any("jaxtyping" in repr(annotation) for annotation in function.__annotations__.values()):
        return function
    passed: dict[Hashable, set[Hashable]] = {}  # the forms of results for each form of arguments

    @cache  # at the first call: most tests call few of all functions
    def checked() -> Any:
        return jaxtyped(function, typechecker=typechecker)

    @wraps(function)
    def once(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        before = (*[_form(value) for value in args], _form(kwargs) if kwargs else None)
        if before not in passed:
            result = checked()(*args, **kwargs)
            passed.setdefault(before, set()).add(_form(result))
            return result
        result = function(*args, **kwargs)
        after = _form(result)
        if after not in passed[before]:
            returned = wraps(function)(lambda *args, **kwargs: result)
            jaxtyped(returned, typechecker=typechecker)(*args, **kwargs)
            passed[before].add(after)
        return result

    return once


def _form(value: Any) -> Hashable:
    """All that a check of a value depends on."""
    kind: Any = type(value)
    if kind is Tensor:  # most are
        return kind, value.dtype, value.shape
    read = _reader(kind)
    form: Hashable = kind if read is None else read(kind, value)
    return form


@cache  # as a look at a type takes longer than most of the checks that it spares
def _reader(kind: type) -> Callable[[type, Any], Hashable] | None:
    """The function that reads the form of values of a type; None where the type is all."""
    if issubclass(kind, (Tensor, ndarray)):
        return lambda kind, value: (kind, value.dtype, value.shape)
    if issubclass(kind, (tuple, list)):
        return lambda kind, value: (kind, *[_form(item) for item in value])
    if issubclass(kind, dict):
        return lambda kind, value: (kind, *[(key, _form(item)) for key, item in value.items()])
    return None
