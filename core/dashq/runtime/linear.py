"""The linear layer of a loaded checkpoint: packed in memory, multiplied by a kernel or unpacked for each product."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from dashq.data import Grouping, Quantized, StoredLayer
from dashq.runtime.kernel_choice import EXACT, choose_kernel
from dashq.runtime.kernels import Kernel, Product
from dashq.runtime.many_tokens import many_tokens
from dashq.runtime.packed import PackedMatrix
from dashq.strategies import Serializer


class DashqLinear(PackedMatrix):
    """y = x Ŵᵀ + bias, where Ŵ is held as the serializer's tensors and unpacked when it is needed.

    The serializer says which tensors there are; they are buffers of the same names as in the checkpoint. A kernel has
    its own in their place, from which what is saved, `quantized()` and `weight` come bit for bit as they were.
    """

    def __init__(self, serializer: Serializer, stored: StoredLayer, bias: bool) -> None:
        super().__init__(serializer, stored)
        self.in_features, self.out_features = stored.layer.columns, stored.layer.rows  # as a plain layer has them
        self.kernel: Kernel | None = None
        self.unpacks = False  # for a comparison: leave the kernel aside, whatever it is
        self.many = math.inf  # tokens for which the kernel's tensors are unpacked first
        self.kernels, self._computes = EXACT, torch.float32
        self._bound: tuple[list[int], Product] | None = None  # the kernel's product, with tensors at these addresses
        self.bias = nn.Parameter(torch.empty(stored.layer.rows), requires_grad=False) if bias else None

    def use(self, kernels: str, dtype: torch.dtype) -> None:
        """Multiply with the kernel that `kernels` means for inputs of `dtype`: `auto`, `exact` or one by name.

        It is chosen again when the layer is moved or cast. The layer unpacks as with `exact` where there is no kernel
        for it, or where the kernel would not give the same bytes back.
        """
        self.restore()
        self.kernels, self._computes = kernels, dtype
        stored = self.packed()
        kernel = choose_kernel(kernels, self.stored, dtype, self.device)
        if kernel is None:
            return
        quantized = self.quantized()
        order = quantized.grouping.order
        tensors = dict(kernel.repack(quantized)) | ({} if order is None else {"order": order})
        again = Quantized.of(*kernel.numbers(tensors, self.stored), quantized.grouping, self.stored.grid)
        packed = self.serializer.pack(again)
        if all(packed[name].equal(tensor) for name, tensor in stored.items()):
            self.hold(tensors, persistent=False)
            self.kernel, self.many = kernel, many_tokens(kernel, tensors, self.stored, dtype)

    def restore(self) -> None:
        """Hold the stored tensors again."""
        if self.kernel:
            packed = self.serializer.pack(self.quantized())
            self.kernel = self._bound = None
            self.hold(packed)

    def quantized(self) -> Quantized:
        tensors = self.packed()
        if self.kernel is None:
            return self.unpack_tensors(tensors)
        return Quantized.of(*self.kernel.numbers(tensors, self.stored), self.grouping_of(tensors), self.stored.grid)

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        # Kernels have no gradients, and none is worth a call for no token at all.
        if self.kernel is None or self.unpacks or not x.numel() or (x.requires_grad and torch.is_grad_enabled()):
            return functional.linear(x, self.quantized().dequantize(x.dtype), self.bias)
        tensors = self.packed()
        groups = self._grouped(x, tensors)
        if torch.compiler.is_compiling():
            product = self.kernel.multiply(groups, tensors, self.stored)
        elif groups.shape[0] >= self.many:
            product = self.kernel.multiply_unpacked(groups.flatten(1), tensors, self.stored)
        else:
            product = self._bound_to(self.kernel, tensors)(groups)
        if product.dtype != x.dtype:
            product = product.to(x.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.view(*x.shape[:-1], self.stored.layer.rows)

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """A plain layer with the same weights."""
        layer = self.stored.layer
        with torch.device("meta"):
            linear = nn.Linear(layer.columns, layer.rows, bias=self.bias is not None, dtype=dtype)
        linear.weight = nn.Parameter(self.quantized().dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def grouping_of(self, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> Grouping:
        """The groups of the layer's columns, with the order that these tensors of it may have."""
        return Grouping(columns=self.stored.layer.columns, size=self.stored.size, order=tensors.get("order"))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bound": None}  # a copy has tensors of its own

    def _bound_to(self, kernel: Kernel, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> Product:
        """The kernel's product with these tensors, made anew when one of them was replaced or moved by whomever."""
        places = [tensor.data_ptr() for tensor in tensors.values()]
        bound = self._bound
        if bound is None or bound[0] != places:
            bound = self._bound = places, kernel.bound(tensors, self.stored)
        return bound[1]

    def _grouped(
        self, x: Float[Tensor, "*batch columns"], tensors: Mapping[str, Shaped[Tensor, "..."]]
    ) -> Float[Tensor, "tokens groups size"]:
        """Inputs in the groups of the stored columns: mostly as they lie, which takes a layer the least time."""
        columns, size = self.stored.layer.columns, self.stored.size
        if self.stored.ordered or columns % size:
            return self.grouping_of(tensors).split_importance(x.reshape(-1, columns))
        return x.reshape(-1, columns // size, size)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel:
            packed = self.serializer.pack(self.quantized())
            destination |= {f"{prefix}{name}": tensor for name, tensor in packed.items()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(
        self, fn: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]], recurse: bool = True
    ) -> "DashqLinear":
        probe = torch.empty(0, dtype=self._computes, device=self.device)
        applied = fn(probe)
        changes = (applied.dtype, applied.device) != (probe.dtype, probe.device)
        if changes:
            self.restore()
        super()._apply(fn, recurse)
        if changes:
            self.use(self.kernels, applied.dtype)
        return self
