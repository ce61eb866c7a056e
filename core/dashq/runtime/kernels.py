"""The interface of a kernel: a program that multiplies with packed codes and does not unpack them first."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from dashq.data import Grid, Grouping, Quantized, StoredLayer


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
    def numbers(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer
    ) -> tuple[UInt8[Tensor, "rows groups size"], Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        """The codes, scales and offsets that were repacked, of the types in which the grid keeps them."""

    @abstractmethod
    def multiply(
        self,
        x: Float[Tensor, "tokens groups size"],
        tensors: Mapping[str, Shaped[Tensor, "..."]],
        stored: StoredLayer,
    ) -> Float[Tensor, "tokens rows"]:
        """The product of the inputs, at least one token, with the transposed weight; of any type of numbers."""

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
        """The product with the unpacked weight, for many tokens; columns are in the order of groups and filled up."""
        return functional.linear(x, self.weight(tensors, stored, x.dtype))


@cache
def is_installed(package: str | None) -> bool:
    """True for None, and for a package that can be imported here."""
    try:
        return package is None or bool(importlib.import_module(package))
    except Exception:  # a library in it may fail in any way on this machine
        return False
