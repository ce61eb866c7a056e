"""Packed embeddings of a loaded checkpoint, and the head that is the same matrix."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from dashq.data import Quantized, StoredLayer
from dashq.runtime.linear import DashqLinear
from dashq.runtime.packed import PackedMatrix
from dashq.strategies import Serializer


class DashqEmbedding(PackedMatrix):
    """Takes the place of a model's embeddings: of the packed matrix only the rows of the given tokens are unpacked.

    The model's own module looks them up there, so that whatever else it does with them, such as to scale them, remains.
    While a kernel of the head that is the same matrix finds single rows, its tensors are the only ones.
    """

    def __init__(self, plain: nn.Embedding, serializer: Serializer, stored: StoredLayer) -> None:
        super().__init__(serializer, stored)
        self.num_embeddings, self.embedding_dim = stored.layer.rows, stored.layer.columns
        self.padding_idx, self._computes = plain.padding_idx, plain.weight.dtype
        plain.padding_idx = None  # which counts rows of the whole matrix
        del plain.weight
        self._plain = (plain,)  # in a tuple, so that it is no submodule with weights to read
        self._holder: tuple[DashqTiedHead, ...] = ()  # the head whose kernel holds the matrix, no submodule either
        self._constants = [name for name, _ in plain.named_buffers()]
        for name in self._constants:
            self.register_buffer(name, plain.get_buffer(name), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._holder[0].device if self._holder else super().device

    def packed(self) -> dict[str, Tensor]:
        return dict(self.serializer.pack(self._holder[0].quantized())) if self._holder else super().packed()

    def leave_to(self, head: "DashqTiedHead") -> None:
        """Hold nothing while the kernel of this head holds the matrix."""
        self.hold({})
        self._holder = (head,)

    def take_back(self) -> None:
        """Hold the stored tensors again."""
        tensors, self._holder = self.packed(), ()
        self.hold(tensors)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch columns"]:
        rows = self._rows(tokens.flatten()).dequantize(self._computes)
        places = torch.arange(len(rows), device=rows.device).view(tokens.shape)
        constants = {name: self.get_buffer(name) for name in self._constants}
        states: Tensor = functional_call(self._plain[0], {"weight": rows, **constants}, (places,))
        return states

    def set_constants(self, initialize: Callable[[nn.Module], Any]) -> None:
        """Let the model compute the constants of its module, such as a scale, which are in no file."""
        (plain,) = self._plain
        plain.weight = nn.Parameter(torch.empty(0, self.embedding_dim), requires_grad=False)
        for name in self._constants:
            plain.register_buffer(name, torch.empty_like(self.get_buffer(name)), persistent=False)
        initialize(plain)
        for name in self._constants:
            self.get_buffer(name).copy_(plain.get_buffer(name))
        del plain.weight

    def dequantized(self, dtype: torch.dtype) -> nn.Embedding:
        """The model's own module with plain weights again."""
        (plain,) = self._plain
        plain.padding_idx = self.padding_idx
        plain.weight = nn.Parameter(self.quantized().dequantize(dtype), requires_grad=False)
        for name in self._constants:
            plain.register_buffer(name, self.get_buffer(name), persistent=False)
        return plain

    def _rows(self, index: Int[Tensor, " rows"]) -> Quantized:
        rows = self._holder[0].rows(index) if self._holder else None
        return rows or self.unpack_tensors(self.serializer.rows(self.packed(), index))

    def _apply(
        self, fn: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]], recurse: bool = True
    ) -> "DashqEmbedding":
        probe = torch.empty(0, dtype=self._computes, device=self.device)
        applied = fn(probe)
        # A kernel's tensors stay as they are where nothing changes: to choose it again takes a while.
        heads = () if (applied.dtype, applied.device) == (probe.dtype, probe.device) else self._holder
        for head in heads:
            head.restore()
        self._computes = applied.dtype
        super()._apply(fn, recurse)
        for head in heads:
            head.use(head.kernels, applied.dtype)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._holder:
            destination |= {f"{prefix}{name}": tensor for name, tensor in self.packed().items()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for head in self._holder:
            head.restore()
        super()._load_from_state_dict(*args, **kwargs)


class DashqTiedHead(DashqLinear):
    """The head of a model whose embeddings are the same matrix: it holds no tensors but a kernel's, and saves none."""

    def __init__(self, embedding: DashqEmbedding, bias: bool) -> None:
        super().__init__(embedding.serializer, embedding.stored, bias)
        self._embedding = (embedding,)  # in a tuple, since it is a submodule elsewhere
        self.hold({})

    def packed(self) -> dict[str, Tensor]:
        return super().packed() if self.kernel else self._embedding[0].packed()

    def use(self, kernels: str, dtype: torch.dtype) -> None:
        """Multiply with a kernel; the embeddings leave the matrix to one that finds single rows."""
        super().use(kernels, dtype)
        if self.rows(torch.zeros(1, dtype=torch.long, device=self.device)):
            self._embedding[0].leave_to(self)

    def rows(self, index: Int[Tensor, " rows"]) -> Quantized | None:
        """These rows of the matrix, if there is a kernel that finds them."""
        tensors = self.packed()
        numbers = self.kernel.rows(tensors, self.stored, index) if self.kernel else None
        return Quantized.of(*numbers, self.grouping_of(tensors), self.stored.grid) if numbers else None

    def restore(self) -> None:
        if self.rows(torch.zeros(1, dtype=torch.long, device=self.device)):
            self._embedding[0].take_back()
        self.kernel = None
        self.hold({})

    def dequantized(self, dtype: torch.dtype) -> nn.Linear:
        """A plain layer without values, which the model ties to the embeddings."""
        layer = self.stored.layer
        linear = nn.Linear(layer.columns, layer.rows, bias=self.bias is not None, dtype=dtype, device="meta")
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype), requires_grad=False)
        return linear

    def _apply(
        self, fn: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]], recurse: bool = True
    ) -> "DashqTiedHead":
        super()._apply(fn, recurse)
        if self.kernel is None:
            self.use(self.kernels, self._computes)  # wherever the embeddings are now
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
