"""Trees of tensors as tensors and JSON: estimators' states go to other processes and to disk without pickle."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from dashq.errors import PluginError

Plain = bool | int | float | str | None


def outline(value: Any) -> Any:
    """A tree as JSON, with types and shapes in the place of its tensors.

    A tree is a tensor, a number, a text or None; or a list, tuple, dict with texts for keys, or dataclass of trees.
    Raises a `PluginError` for anything else.
    """
    if isinstance(value, Tensor):
        return {"tensor": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, Plain):
        return value
    parts = _parts(value)
    if isinstance(parts, Mapping):
        return {"fields": {name: outline(part) for name, part in parts.items()}}
    return [outline(part) for part in parts]


def tensors_of(value: Any) -> Iterator[Shaped[Tensor, "..."]]:
    """The tensors of a tree, in the order of its outline."""
    if isinstance(value, Tensor):
        yield value
    elif not isinstance(value, Plain):
        parts = _parts(value)
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            yield from tensors_of(part)


def rebuilt(value: Any, like: Any, tensors: Iterator[Shaped[Tensor, "..."]]) -> Any:
    """The tree of an outline, with its tensors in their order.

    Lists, tuples and dataclasses are those of a tree that is `like` it: the outline has no names of classes. Items that
    a list has beyond the other's are like its last one. Raises a `PluginError` where the two do not fit.
    """
    if isinstance(value, dict) and "tensor" in value:
        return next(tensors)
    if isinstance(value, Plain):
        return value
    if isinstance(value, dict) and is_dataclass(like):
        kind: Any = type(like)
        return kind(**_rebuilt_fields(value["fields"], vars(like), tensors))
    if isinstance(value, dict) and isinstance(like, dict):
        return _rebuilt_fields(value["fields"], like, tensors)
    if isinstance(value, list) and isinstance(like, list | tuple):
        models = [like[min(index, len(like) - 1)] if like else None for index in range(len(value))]
        items = [rebuilt(item, model, tensors) for item, model in zip(value, models, strict=True)]
        return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
    raise PluginError(
        f"a state came from another process or from disk that is not built as {type(like).__name__} is here"
    )


def _rebuilt_fields(
    values: Mapping[str, Any], like: Mapping[str, Any], tensors: Iterator[Shaped[Tensor, "..."]]
) -> dict[str, Any]:
    return {name: rebuilt(value, like.get(name), tensors) for name, value in values.items()}


def _parts(value: Any) -> Mapping[str, Any] | Sequence[Any]:
    """The trees that a tree is made of."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    if isinstance(value, list | tuple):
        return value
    raise PluginError(
        f"a state that holds a {type(value).__name__} cannot be sent to other processes or kept: it should be made of "
        "tensors, numbers, texts and None, in lists, tuples, dicts and dataclasses"
    )
