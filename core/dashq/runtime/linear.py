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
from dashq.runtime.kernels import Kernel
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
        self.kernel: Kernel | None = None
        self.unpacks = False  # for a comparison: leave the kernel aside, whatever it is
        self.many = math.inf  # tokens for which the kernel's tensors are unpacked first
        # The kernel's product with the tensors as they lie now.
        self._bound: Callable[[Float[Tensor, "*batch columns"]], Float[Tensor, "tokens rows"]] | None = None
        self.kernels, self._computes = EXACT, torch.float32
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
            self.kernel = None
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
        tokens = x.numel() // x.shape[-1]
        if tokens >= self.many or torch.compiler.is_compiling():
            tensors = self.packed()
            groups = self.grouping_of(tensors).split_importance(x.reshape(-1, x.shape[-1]))
            if torch.compiler.is_compiling():
                product = self.kernel.multiply(groups, tensors, self.stored)
            else:
                product = self.kernel.multiply_unpacked(groups.flatten(1), tensors, self.stored)
        else:
            if self._bound is None:
                self._bound = self._bind(self.kernel)
            product = self._bound(x)
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

    def hold(self, tensors: Mapping[str, Shaped[Tensor, "..."]], persistent: bool = True) -> None:
        super().hold(tensors, persistent)
        self._bound = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy binds its kernel to tensors of its own.
        return self.__dict__ | {"_bound": None}

    def _bind(self, kernel: Kernel) -> Callable[[Float[Tensor, "*batch columns"]], Float[Tensor, "tokens rows"]]:
        """All of a product that does not depend on its inputs is done before: small products take less time."""
        tensors = self.packed()
        multiply, grouping = kernel.bound(tensors, self.stored), self.grouping_of(tensors)
        if grouping.order is None and grouping.columns % grouping.size == 0:
            return lambda x: multiply(x.reshape(-1, grouping.groups, grouping.size))
        return lambda x: multiply(grouping.split_importance(x.reshape(-1, grouping.columns)))

    def grouping_of(self, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> Grouping:
        """The groups of the layer's columns, with the order that these tensors of it may have."""
        return Grouping(columns=self.stored.layer.columns, size=self.stored.size, order=tensors.get("order"))

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
        self._bound = None
        if changes:
            self.use(self.kernels, applied.dtype)
        return self
