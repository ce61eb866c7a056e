"""Equality of values, and descriptions of them without their numbers, for the contracts."""

from collections.abc import Mapping
from dataclasses import is_dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq.curvature import Curvature
from dashq.data import Quantized


def equal(one: object, other: object) -> bool:
    """True where two values are equal bit by bit, dataclasses field by field."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if is_dataclass(one):
        return type(one) is type(other) and all(equal(value, vars(other)[key]) for key, value in vars(one).items())
    return one == other


def close(one: Curvature, other: Curvature) -> bool:
    """True where two curvatures are equal but for the rounding of sums."""
    x, y = one.dense(), other.dense()
    return torch.allclose(x, y, rtol=1e-4, atol=1e-6 * float(y.abs().max()))


def same(one: Quantized, other: Quantized) -> bool:
    """True where two layers are equal bit by bit, but for the filling of a short last group and the order's type."""
    columns = other.grouping.columns
    orders = [None if q.grouping.order is None else q.grouping.order.tolist() for q in (one, other)]
    return (
        equal(one.codes.flatten(1)[:, :columns], other.codes.flatten(1)[:, :columns])
        and equal(one.scale, other.scale)
        and equal(one.offset, other.offset)
        and (one.grid, orders[0]) == (other.grid, orders[1])
        and equal(one.dequantize(), other.dequantize())
    )


def layout(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shape and the type of each tensor by name."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def shape_of(value: object) -> str:
    """A description of an example without its numbers."""
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if is_dataclass(value):
        return f"{type(value).__name__}({', '.join(f'{key}={shape_of(part)}' for key, part in vars(value).items())})"
    return str(value)
