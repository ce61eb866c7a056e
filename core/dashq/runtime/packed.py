"""A packed matrix of a loaded checkpoint: the serializer's tensors as buffers of the same names."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from dashq.data import Quantized, StoredLayer
from dashq.strategies import Serializer


class PackedMatrix(nn.Module):
    """Ŵ as the serializer's tensors, which keep their types when the model is cast, and are unpacked when needed."""

    def __init__(self, serializer: Serializer, stored: StoredLayer) -> None:
        super().__init__()
        self.serializer, self.stored = serializer, stored
        packed = serializer.pack(stored.empty())
        self.hold({name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in packed.items()})

    @property
    def device(self) -> torch.device:
        """The device on which its tensors lie."""
        return next(iter(self.packed().values())).device

    def packed(self) -> dict[str, Tensor]:
        """The tensors that the matrix is held as, by name."""
        find = cast(Callable[[str], Tensor], super().__getattr__)  # which takes half the time: every product asks
        return {name: find(name) for name in self._packed_names}

    def quantized(self) -> Quantized:
        """The layer's codes, scales and offsets."""
        return self.unpack_tensors(self.packed())

    def __getattr__(self, name: str) -> Any:
        # Some models look at the weight: it is unpacked anew at each access, unless the format has a tensor so named.
        if name == "weight" and name not in self.__dict__.get("_packed_names", ("weight",)):
            return self.quantized().dequantize()
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        stored = self.stored
        return f"{stored.layer.columns}, {stored.layer.rows}, bits={stored.grid.bits}, group_size={stored.size}"

    def unpack_tensors(self, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> Quantized:
        stored = self.stored
        return self.serializer.unpack(tensors, stored.layer.columns, stored.size, stored.grid)

    def hold(self, tensors: Mapping[str, Shaped[Tensor, "..."]], persistent: bool = True) -> None:
        """Put these tensors in the place of those that are there; what is not persistent is not saved."""
        for name in self.__dict__.get("_packed_names", ()):
            delattr(self, name)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=persistent)
        self._packed_names = tuple(tensors)

    def _apply(
        self, fn: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]], recurse: bool = True
    ) -> "PackedMatrix":
        # `model.to(bfloat16)` is meant for what computes; stored scales would lose digits.
        kept = {name: getattr(self, name) for name in self._packed_names}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        return self
