"""The linear layer of a loaded checkpoint: packed in memory, unpacked for each product."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from dashq.data import Quantized, StoredLayer
from dashq.strategies import Serializer


class DashqLinear(nn.Module):
    """y = x Ŵᵀ + bias, where Ŵ is held as the serializer's tensors and unpacked when it is needed.

    The serializer says which tensors there are; they are buffers of the same names as in the checkpoint.
    """

    def __init__(self, serializer: Serializer, stored: StoredLayer, bias: bool) -> None:
        super().__init__()
        self.serializer, self.stored = serializer, stored
        packed = serializer.pack(stored.empty())
        self._packed_names = tuple(packed)
        for name, tensor in packed.items():
            self.register_buffer(name, torch.empty(tensor.shape, dtype=tensor.dtype))
        self.bias = nn.Parameter(torch.empty(stored.layer.rows), requires_grad=False) if bias else None

    def quantized(self) -> Quantized:
        """The layer's codes, scales and offsets."""
        tensors = {name: self.get_buffer(name) for name in self._packed_names}
        return self.serializer.unpack(tensors, self.stored.layer.columns, self.stored.size, self.stored.grid)

    def __getattr__(self, name: str) -> Any:
        # Some models look at the weight: it is unpacked anew at each access, unless the format has a tensor so named.
        if name == "weight" and name not in self.__dict__.get("_packed_names", ("weight",)):
            return self.quantized().dequantize()
        return super().__getattr__(name)

    def forward(self, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        return functional.linear(x, self.quantized().dequantize(x.dtype), self.bias)

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """A plain layer with the same weights."""
        layer = self.stored.layer
        with torch.device("meta"):
            linear = nn.Linear(layer.columns, layer.rows, bias=self.bias is not None, dtype=dtype)
        linear.weight = nn.Parameter(self.quantized().dequantize(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        stored = self.stored
        return f"{stored.layer.columns}, {stored.layer.rows}, bits={stored.grid.bits}, group_size={stored.size}"

    def _apply(
        self, fn: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]], recurse: bool = True
    ) -> "DashqLinear":
        # `model.to(bfloat16)` is meant for what computes; stored scales would lose digits.
        kept = {name: self.get_buffer(name) for name in self._packed_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self
