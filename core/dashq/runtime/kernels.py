"""The interface of a kernel: a program that multiplies with packed codes and does not unpack them first."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from dashq.data import Grid, Grouping, Quantized, StoredLayer
from dashq.device import multiplies_bfloat16

Numbers = tuple[
    UInt8[Tensor, "rows groups size"], Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]
]  # codes, scales and offsets
Product = Callable[[Float[Tensor, "tokens groups size"]], Float[Tensor, "tokens rows"]]


class Kernel(ABC):
    """One way to multiply, for layers of some shapes, grids, devices and types of computation.

    A layer's numbers live in the kernel's own tensors while it is in use. `numbers` must give back each code, scale and
    offset as it was stored: a layer for which it does not stays as it is. Inputs come in groups, in the order of the
    stored columns, with zeros where the last group is filled up, so that a kernel knows no order and no rest.

    It is asked for by its `name`. `package` is what it needs, as Python imports it, and comes with the extra `kernels`;
    None stands for torch alone.
    """

    name: str
    package: str | None

    def works(self, grid: Grid) -> bool:
        """True where its package can be imported; for some grids a kernel may ask more of the machine."""
        return is_installed(self.package)

    @abstractmethod
    def holds(self, stored: StoredLayer, dtype: torch.dtype, device: torch.device) -> bool:
        """True where the kernel multiplies with such a layer on this device, inputs and outputs being of `dtype`."""

    @abstractmethod
    def pays(self, stored: StoredLayer) -> bool:
        """True where its speed and its memory have been measured to be worth while for such a layer."""

    @abstractmethod
    def repack(self, quantized: Quantized) -> Mapping[str, Shaped[Tensor, "..."]]:
        """The kernel's tensors by name, none of them named `order`, which take the place of the stored ones."""

    @abstractmethod
    def numbers(self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer) -> Numbers:
        """The codes, scales and offsets that were repacked, of the types in which the grid keeps them."""

    def rows(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer, index: Int[Tensor, " rows"]
    ) -> Numbers | None:
        """`numbers` of these rows alone; None where they are not sooner found than those of all rows.

        With them a kernel of a head that is also the embeddings holds the matrix for both.
        """
        return None

    @abstractmethod
    def multiply(
        self,
        x: Float[Tensor, "tokens groups size"],
        tensors: Mapping[str, Shaped[Tensor, "..."]],
        stored: StoredLayer,
    ) -> Float[Tensor, "tokens rows"]:
        """The product of the inputs, at least one token, with the transposed weight; of any type of numbers."""

    def bound(self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer) -> Product:
        """`multiply` with tensors that stay where they are, for one product after the other."""
        return lambda x: self.multiply(x, tensors, stored)

    def weight(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer, dtype: torch.dtype
    ) -> Float[Tensor, "rows columns"]:
        """The unpacked weight, for many tokens: columns in the order of groups, the last one filled up."""
        codes, scale, offset = self.numbers(tensors, stored)
        grouping = Grouping(columns=codes[0].numel(), size=stored.size)
        return Quantized(codes=codes, scale=scale, offset=offset, grouping=grouping, grid=stored.grid).dequantize(dtype)

    def multiply_unpacked(
        self,
        x: Float[Tensor, "tokens columns"],
        tensors: Mapping[str, Shaped[Tensor, "..."]],
        stored: StoredLayer,
    ) -> Float[Tensor, "tokens rows"]:
        """The product with the unpacked weight, for many tokens; columns are in the order of groups and filled up.

        It is computed in the type that `unpacked_dtype` gives.
        """
        x = x.to(unpacked_dtype(x))
        return functional.linear(x, self.weight(tensors, stored, x.dtype))


def unpacked_dtype(x: Float[Tensor, "tokens columns"]) -> torch.dtype:
    """The type to multiply these inputs and unpacked weights in: float32 where 16 bits take many times as long."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 and multiplies_bfloat16(x.device) else torch.float32


@cache
def is_installed(package: str | None) -> bool:
    """True for None, and for a package that can be imported here."""
    try:
        return package is None or bool(importlib.import_module(package))
    except Exception:  # a library in it may fail in any way on this machine
        return False
