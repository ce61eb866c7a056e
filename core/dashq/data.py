"""The immutable values that flow between strategies."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor
from torch.nn import functional

Zero = Literal["real", "integer", "symmetric"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight matrix to quantize. `expert` is None outside mixture-of-experts blocks."""

    name: str
    rows: int
    columns: int
    expert: int | None = None


class Curvature(ABC):
    """What calibration learned about one layer's inputs."""

    @abstractmethod
    def diagonal(self) -> Float[Tensor, " columns"]:
        """The importance of each column, which every curvature can offer."""


@dataclass(frozen=True, eq=False)
class Diagonal(Curvature):
    """One importance per input column and nothing between columns: the paper's curvature."""

    values: Float[Tensor, " columns"]

    def diagonal(self) -> Float[Tensor, " columns"]:
        return self.values


@dataclass(frozen=True, eq=False)
class Full(Curvature):
    """The whole second moment of the inputs, H = XᵀX up to a factor."""

    matrix: Float[Tensor, "columns columns"]

    def diagonal(self) -> Float[Tensor, " columns"]:
        return torch.diagonal(self.matrix)


@dataclass(frozen=True, eq=False, kw_only=True)
class Grouping:
    """The columns, in `order` (None: as they are), cut into groups of `size`.

    Where `size` does not divide `columns` the last group is filled up by repeating its last column, which
    changes neither its smallest nor its largest weight; `split_importance` gives the filling no importance.
    """

    columns: int
    size: int
    order: Int[Tensor, " columns"] | None = None

    @property
    def groups(self) -> int:
        return -(-self.columns // self.size)

    def split(self, x: Num[Tensor, "*rows columns"]) -> Num[Tensor, "*rows groups size"]:
        """Cut values per column into groups."""
        x = x if self.order is None else x[..., self.order]
        if self._filling:
            x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], self._filling)], dim=-1)
        return x.reshape(*x.shape[:-1], self.groups, self.size)

    def take(self, x: Num[Tensor, "*rows columns"], group: int) -> Num[Tensor, "*rows size"]:
        """The values of one group, as `split` gives them; a view where its columns lie side by side."""
        first = group * self.size
        if self.order is None and first + self.size <= self.columns:
            return x[..., first : first + self.size]
        columns = torch.arange(first, first + self.size, device=x.device).clamp_max(self.columns - 1)
        return x[..., columns if self.order is None else self.order[columns]]

    def split_importance(self, h: Float[Tensor, " columns"]) -> Float[Tensor, "groups size"]:
        """Cut importances into groups; the columns that fill up the last group weigh nothing."""
        h = h if self.order is None else h[self.order]
        return functional.pad(h, (0, self._filling)).reshape(self.groups, self.size)

    def join(self, x: Num[Tensor, "*rows groups size"]) -> Num[Tensor, "*rows columns"]:
        """The inverse of `split`."""
        x = x.flatten(-2)[..., : self.columns]
        return x if self.order is None else x[..., torch.argsort(self.order)]

    @property
    def _filling(self) -> int:
        return self.groups * self.size - self.columns


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a file format can hold, so that a solver never chooses what would be rounded later.

    Codes run from 0 to `top`, and scales are numbers of type `dtype`, above zero unless there are `negative_scales`.
    The zero, -offset / scale, is `real`: then the offset is any number of type `dtype`; or `integer`: a code from 0
    to `top`; or `symmetric`: the code in the `middle`. With a zero that is a code, offsets are kept in float32.
    """

    bits: int
    dtype: torch.dtype
    zero: Zero = "real"
    negative_scales: bool = False

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code that stands for 0 on a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def offset_dtype(self) -> torch.dtype:
        """The type of offsets: float32 holds scale · code without rounding where scales are of 16 bits."""
        return self.dtype if self.zero == "real" else torch.float32


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantized:
    """`weight = scale * codes + offset`, group by group; `statistics` are what a solver has to tell about its work."""

    codes: UInt8[Tensor, "rows groups size"]
    scale: Float[Tensor, "rows groups"]
    offset: Float[Tensor, "rows groups"]
    grouping: Grouping
    grid: Grid
    statistics: Mapping[str, float] = field(default_factory=dict)

    @property
    def zeros(self) -> Float[Tensor, "rows groups"]:
        """The codes that stand for 0: whole numbers, unless the grid's zero is real."""
        zeros = -self.offset.float() / self.scale.float()
        return zeros if self.grid.zero == "real" else zeros.round()

    def dequantize(self) -> Float[Tensor, "rows columns"]:
        """The weights that the stored numbers stand for, in float32."""
        weight = self.codes.float().mul_(self.scale[..., None].float()).add_(self.offset[..., None].float())
        return self.grouping.join(weight)
