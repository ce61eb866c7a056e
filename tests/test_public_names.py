"""`from dashq import …` reaches every name that stands in a public signature."""

import inspect
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import transformers

import dashq
from dashq.strict import Strict

# pydantic's doing, and what it only wraps: a reader of the interfaces has no use for these.
PLUMBING: set[type] = {Strict}
# Modules that are imported for type checkers alone, since it takes long.
LATE = {"transformers": transformers}


def annotated_types(annotation: Any) -> Iterator[type]:
    """The classes inside an annotation, such as `Layer` in `Callable[[Sequence[Layer]], None] | None`."""
    if isinstance(annotation, list | tuple):
        parts: Iterable[Any] = annotation
    else:
        parts = typing.get_args(annotation)
    if isinstance(annotation, type):
        yield annotation
    for part in parts:
        yield from annotated_types(part)


def public_members(cls: type) -> Iterator[Any]:
    """The class itself, for its fields, and each method or property that its author writes for others."""
    yield cls
    for name, member in vars(cls).items():
        if not name.startswith("_") or name == "__init__":
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(function) and function.__module__.startswith("dashq"):  # not pydantic's own
                yield function


def types_in_signatures(value: Any) -> set[type]:
    """The classes of dashq that the signatures of a public value name."""
    members = public_members(value) if isinstance(value, type) else [value]
    annotations = [
        annotation
        for member in members
        if isinstance(member, type) or inspect.isfunction(member)
        for name, annotation in inspect.get_annotations(inspect.unwrap(member), locals=LATE, eval_str=True).items()
        if not name.startswith("_")
    ]
    types = {cls for annotation in [*annotations, *typing.get_args(value)] for cls in annotated_types(annotation)}
    return {cls for cls in types if cls.__module__.split(".")[0] == "dashq"}


def test_everything_in_public_signatures_is_public() -> None:
    public = {name: getattr(dashq, name) for name in dashq.__all__}
    missing = {
        f"{name}: {cls.__module__}.{cls.__name__}"
        for name, value in public.items()
        for cls in types_in_signatures(value) - PLUMBING - set(filter(inspect.isclass, public.values()))
    }
    assert not missing


def test_public_names_are_sorted_and_there() -> None:
    assert dashq.__all__ == sorted(dashq.__all__)
    assert len(set(dashq.__all__)) == len(dashq.__all__)


def test_signatures_are_searched_where_types_hide() -> None:
    def function(layers: "list[dashq.Layer] | None", listen: "dashq.Listener") -> dict[str, dashq.Grid]:
        raise NotImplementedError

    assert types_in_signatures(function) >= {dashq.Layer, dashq.Grid, dashq.BlockDone, dashq.LayerDone}
    assert types_in_signatures(dashq.Serializer) >= {dashq.StoredLayer, dashq.Quantized}
    assert types_in_signatures(dashq.Recipe) >= {dashq.Override, dashq.Budget, dashq.Registry}
    assert types_in_signatures(dashq.Program) == {dashq.Opened}
