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
    passed: set[Hashable] = set()

    @cache  # at the first call: most tests call few of all functions
    def checked() -> Any:
        return jaxtyped(function, typechecker=typechecker)

    @wraps(function)
    def once(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        before = _form([args, kwargs])
        if before not in passed:
            result = checked()(*args, **kwargs)
        else:
            result = function(*args, **kwargs)
            if (before, _form(result)) not in passed:
                returned = wraps(function)(lambda *args, **kwargs: result)
                jaxtyped(returned, typechecker=typechecker)(*args, **kwargs)
        passed.update((before, (before, _form(result))))
        return result

    return once


def _form(value: object) -> Hashable:
    """All that a check of a value depends on."""
    if isinstance(value, (Tensor, ndarray)):
        return type(value), value.dtype, value.shape
    if isinstance(value, (tuple, list)):
        return type(value), *map(_form, value)
    if isinstance(value, dict):
        return dict, *((key, _form(item)) for key, item in value.items())
    return (type(value),)
