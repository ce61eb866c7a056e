"""The immutable values that flow between strategies."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Num, Shaped, UInt8
from torch import Tensor, nn
from torch.nn import functional

CACHED = 2**17  # float32 numbers that fit a core's cache

Zero = Literal["real", "integer", "symmetric"]
Role = Literal["linear", "embeddings", "per_layer", "head", "tied"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight matrix to quantize. `expert` is its number in a mixture of experts, None outside of one.

    Its `role` is `linear` in decoder blocks. Outside of them there are the `embeddings`, one row for each token, and
    the `head`, which predicts tokens; one matrix that is both is `tied`, and has the name of the embeddings. Few models
    have `per_layer` embeddings besides, whose rows hold a part for each block.
    """

    name: str
    rows: int
    columns: int
    expert: int | None = None
    role: Role = "linear"

    @cached_property
    def block(self) -> str:
        """The name of its decoder block: its own name up to the first number in it; empty where it has none."""
        parts = self.name.split(".")
        ends = [end for end, part in enumerate(parts, start=1) if part.isdecimal()]
        return ".".join(parts[: ends[0]]) if ends else ""

    @property
    def is_looked_up(self) -> bool:
        """True for a matrix whose rows alone are used, one for each token, and that nothing is multiplied with."""
        return self.role in ("embeddings", "per_layer")

    @property
    def stack(self) -> str | None:
        """The name that all experts of its kind share, with a star in the place of the number; None for no expert."""
        if self.expert is None:
            return None
        parts = self.name.split(".")
        parts[len(parts) - 1 - parts[::-1].index(str(self.expert))] = "*"
        return ".".join(parts)

    @property
    def weights(self) -> int:
        """The number of weights in the matrix."""
        return self.rows * self.columns


def average_bits(sizes: Iterable[tuple[Layer, int]]) -> float:
    """Bits on disk for each weight, from layers and their bytes: of those in blocks, or of all where there are none."""
    layers = list(sizes)
    counted = [(layer, size) for layer, size in layers if layer.role == "linear"] or layers
    return 8 * sum(size for _, size in counted) / sum(layer.weights for layer, _ in counted)


@dataclass(frozen=True, eq=False, kw_only=True)
class Grouping:
    """The columns, in `order` (None: in their own), cut into groups of `size`.

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

    def take(self, x: Num[Tensor, "*rows columns"], part: slice) -> Num[Tensor, "*rows groups size"]:
        """The values of some groups, as `split` gives them; a view where their columns lie side by side."""
        first, end, _ = part.indices(self.groups)
        columns: slice | Tensor = slice(first * self.size, end * self.size)
        if self.order is not None or end * self.size > self.columns:
            index = torch.arange(first * self.size, end * self.size).clamp_max(self.columns - 1)  # serves any device
            columns = index if self.order is None else self.order[index]
        taken = x[..., columns]
        return taken.view(*taken.shape[:-1], end - first, self.size)

    def split_importance(self, h: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows groups size"]:
        """Cut importances, or gradients, into groups; the columns that fill up the last group weigh nothing."""
        h = h if self.order is None else h[..., self.order]
        h = functional.pad(h, (0, self._filling)) if self._filling else h
        return h.reshape(*h.shape[:-1], self.groups, self.size)

    def join(self, x: Num[Tensor, "*rows groups size"]) -> Num[Tensor, "*rows columns"]:
        """The inverse of `split`."""
        x = x.flatten(-2)[..., : self.columns]
        return x if self.order is None else x[..., torch.argsort(self.order)]

    @property
    def _filling(self) -> int:
        return self.groups * self.size - self.columns


@dataclass(frozen=True, kw_only=True)
class SuperBlocks:
    """`groups` neighbouring groups of `size` columns that share two float16 units, as in GGUF's k-quants.

    A group's scale is one unit times a whole number from 1 to `top`, its offset minus the other unit times one from 0
    to `top`. Where they are `signed`, scales are whole numbers from -`top` - 1 to `top` times a unit of either sign;
    where they are `odd`, odd numbers from 1 to `top` times the unit. In both cases there are no offsets of their own:
    the zero is symmetric.
    """

    groups: int
    size: int
    top: int
    signed: bool = False
    odd: bool = False

    @property
    def has_offsets(self) -> bool:
        """True where groups have offsets of their own, with a unit for them."""
        return not (self.signed or self.odd)

    @property
    def multiples(self) -> Int[Tensor, " multiples"]:
        """The whole numbers that scales can be of their unit, in ascending order."""
        numbers = torch.arange(-self.top - 1 if self.signed else 1, self.top + 1, 2 if self.odd else 1)
        return numbers[numbers != 0]

    @property
    def columns(self) -> int:
        """Columns of one super-block."""
        return self.groups * self.size


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """Levels that are not evenly spaced, and the patterns of codes that neighbouring columns may have together.

    Code c stands for `levels[c]`, a number that float32 holds, in ascending order. Each `width` columns of a row, from
    the first one on, have one of the `patterns`: the codes of all of them, one byte each, one pattern after the other.
    With `signs` every single column may also have the negative of its level, which then is a level too.
    """

    levels: tuple[float, ...]
    patterns: bytes = field(repr=False)
    width: int = 1
    signs: bool = False

    @property
    def is_scalar(self) -> bool:
        """True where every column may have every level, whatever its neighbours have."""
        return self.width == 1 and not self.signs and len(self.patterns) == len(self.levels)

    def values(self, codes: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The levels of some codes."""
        return torch.tensor(self.levels, device=codes.device)[codes.int()]

    def codes(self, values: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
        """The codes of some levels."""
        return torch.searchsorted(torch.tensor(self.levels, device=values.device), values.contiguous()).to(torch.uint8)

    def entries(self, device: torch.device) -> Float[Tensor, "patterns width"]:
        """The levels of every pattern."""
        codes = torch.frombuffer(bytearray(self.patterns), dtype=torch.uint8).view(-1, self.width)
        return self.values(codes).to(device)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that a file format can hold, so that a solver never chooses what would be rounded later.

    Codes run from 0 to `top`, and scales are numbers of type `dtype`, above zero unless there are `negative_scales`.
    The zero, -offset / scale, is `real`: then the offset is any number of type `dtype`; or `integer`: a code from 0
    to `top`; or `symmetric`: the code in the `middle`. With a zero that is a code, offsets are kept in float32; so are
    they where a file holds a real zero itself, as a number of type `dtype`, in place of the offset (`stores_zero`).
    With `super_blocks`, scales and offsets are products of stored numbers, which float32 holds without rounding. With a
    `codebook`, whose levels lie around 0, a scale is multiplied with a code's level in the place of the code.
    """

    bits: int
    dtype: torch.dtype
    zero: Zero = "real"
    negative_scales: bool = False
    stores_zero: bool = False
    super_blocks: SuperBlocks | None = None
    codebook: Codebook | None = None

    @property
    def top(self) -> int:
        """The largest code."""
        return len(self.codebook.levels) - 1 if self.codebook else (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code that stands for 0 on a symmetric grid; with a codebook 0 itself, which may be no level."""
        return 0 if self.codebook else 1 << (self.bits - 1)

    @property
    def smallest_scale(self) -> float:
        """The smallest size of a scale, a normal number of the type that files hold: float16 for super-blocks."""
        return torch.finfo(torch.float16 if self.super_blocks else self.dtype).smallest_normal

    @property
    def offset_dtype(self) -> torch.dtype:
        """The type of offsets: float32 holds scale · code without rounding where scales are of 16 bits."""
        return self.dtype if self.zero == "real" and not self.stores_zero else torch.float32


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantized:
    """`weight = scale * codes + offset`, group by group; on a grid with a codebook, `scale * levels[codes] + offset`.

    `statistics` are figures about the solver's work by name, none of them a name that the curvature's `report` has;
    `fallbacks` are sentences on what it could not do as usual.
    """

    codes: UInt8[Tensor, "rows groups size"]
    scale: Float[Tensor, "rows groups"]
    offset: Float[Tensor, "rows groups"]
    grouping: Grouping
    grid: Grid
    statistics: Mapping[str, float] = field(default_factory=dict)
    fallbacks: Collection[str] = ()

    @classmethod
    def of(
        cls,
        codes: UInt8[Tensor, "rows groups size"],
        scale: Float[Tensor, "rows groups"],
        offset: Float[Tensor, "rows groups"],
        grouping: Grouping,
        grid: Grid,
    ) -> "Quantized":
        """A solver's result from scales and offsets that the grid holds, brought into the types it keeps them in."""
        return cls(
            codes=codes,
            scale=scale.to(grid.dtype),
            offset=offset.to(grid.offset_dtype),
            grouping=grouping,
            grid=grid,
        )

    @property
    def zeros(self) -> Float[Tensor, "rows groups"]:
        """The codes that stand for 0: whole numbers, unless the grid's zero is real."""
        zeros = -self.offset.float() / self.scale.float()
        return zeros if self.grid.zero == "real" else zeros.round()

    def numbers(self, codes: UInt8[Tensor, "*some groups size"]) -> Float[Tensor, "*some groups size"]:
        """The numbers that scales are multiplied with, for some of the codes."""
        return self.grid.codebook.values(codes) if self.grid.codebook else codes.float()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "rows columns"]:
        """The weights that the stored numbers stand for, computed in float32 and rounded once to `dtype`."""
        weight = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        # A few rows at a time on the CPU: what is computed stays in the cache, and is never in memory as a whole. A
        # compiled graph fuses the steps itself.
        few = weight.device.type == "cpu" and not torch.compiler.is_compiling()
        rows = max(1, CACHED // weight[0].numel()) if few else len(weight)
        tensors = (self.codes, self.scale[..., None], self.offset[..., None], weight)
        for codes, scale, offset, part in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            part.copy_(self.numbers(codes).mul_(scale.float()).add_(offset.float()))
        return self.grouping.join(weight)


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """The form of one layer in a checkpoint, present or planned; `ordered` where its columns have another order."""

    layer: Layer
    grid: Grid
    size: int
    ordered: bool

    def empty(self) -> Quantized:
        """The layer without values: its tensors lie on the meta device, with shapes and types alone."""
        layer, grid, meta = self.layer, self.grid, torch.device("meta")
        order = torch.empty(layer.columns, dtype=torch.int64, device=meta) if self.ordered else None
        grouping = Grouping(columns=layer.columns, size=self.size, order=order)
        return Quantized(
            codes=torch.empty(layer.rows, grouping.groups, self.size, dtype=torch.uint8, device=meta),
            scale=torch.empty(layer.rows, grouping.groups, dtype=grid.dtype, device=meta),
            offset=torch.empty(layer.rows, grouping.groups, dtype=grid.offset_dtype, device=meta),
            grouping=grouping,
            grid=grid,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Contents:
    """A finished model on disk: handles of its tensors by name, and the folder with its configuration and tokenizer.

    `layers` are the quantized ones by name; their tensors are named after them, as `Serializer.pack` has them. Code
    that lies in the folder may run only where it is trusted: `trust_remote_code` is for whatever opens the folder.
    While the model is written, `source` is the one file that the original was read from, such as one of GGUF.
    """

    folder: Path
    layers: Mapping[str, StoredLayer]
    tensors: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    source: Path | None = None


@dataclass(frozen=True, eq=False)
class Tunable:
    """A change that a tuner may make: the `parameter`, float32 and 0 at first, of a layer or norm of this `name`.

    With h for half of the largest code, a scale s becomes s (1 + a / h), an offset m becomes m - a s + b s, a norm's
    gain g becomes g + c r with the root mean square r of the gain; in super-blocks the units of scales and of offsets
    become u (1 + a / h) each. What is stored is the nearest value that the file holds.
    """

    kind: Literal["scale", "offset", "norm"]
    name: str
    parameter: nn.Parameter


def size_of(tensors: Iterable[Shaped[Tensor, "..."]]) -> int:
    """Bytes that the tensors take on disk."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
