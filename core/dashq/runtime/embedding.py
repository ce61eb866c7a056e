"""Packed embeddings of a loaded checkpoint, and the head that is the same matrix."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from dashq.data import Grouping, Quantized, StoredLayer
from dashq.runtime.kernels import Kernel, Numbers
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
        # The kernel of a tied head that holds the matrix, and its tensors. Not the head, which knows the embeddings: a
        # circle would keep the matrix in memory when nobody needs the model any more.
        self._held: tuple[Kernel, Mapping[str, Tensor]] | None = None
        self._constants = [name for name, _ in plain.named_buffers()]
        for name in self._constants:
            self.register_buffer(name, plain.get_buffer(name), persistent=False)

    @property
    def device(self) -> torch.device:
        return next(iter(self._held[1].values())).device if self._held else super().device

    def packed(self) -> dict[str, Tensor]:
        return dict(self.serializer.pack(self.quantized())) if self._held else super().packed()

    def quantized(self) -> Quantized:
        """The matrix's codes, scales and offsets."""
        if self._held is None:
            return super().quantized()
        kernel, tensors = self._held
        return self._of(kernel.numbers(tensors, self.stored), tensors)

    @property
    def _is_left(self) -> bool:
        """True while a kernel has the matrix."""
        return self._held is not None

    def _leave_to(self, kernel: Kernel, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Hold nothing of one's own while a kernel that finds single rows has these tensors."""
        self.hold({})
        self._held = kernel, tensors

    def _take_back(self) -> None:
        """Hold the stored tensors."""
        tensors, self._held = self.packed(), None
        self.hold(tensors)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch columns"]:
        rows = self._rows(tokens.flatten()) if tokens.numel() else torch.empty(0, self.embedding_dim)
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

    def _rows(self, index: Int[Tensor, " rows"]) -> Float[Tensor, "rows columns"]:
        if self._held is None:
            rows = self.unpack_tensors(self.serializer.rows(self.packed(), index))
        else:
            kernel, tensors = self._held
            numbers = kernel.rows(tensors, self.stored, index)
            assert numbers is not None  # or the matrix would not have been left to the kernel
            rows = self._of(numbers, tensors)
        return rows.dequantize(self._computes)

    def _of(self, numbers: Numbers, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> Quantized:
        grouping = Grouping(columns=self.embedding_dim, size=self.stored.size, order=tensors.get("order"))
        return Quantized.of(*numbers, grouping, self.stored.grid)

    def _apply(
        self, fn: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]], recurse: bool = True
    ) -> "DashqEmbedding":
        probe = torch.empty(0, dtype=self._computes, device=self.device)
        applied = fn(probe)
        if self._held and applied.device != probe.device:
            self._take_back()
        self._computes = applied.dtype
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._held:
            destination |= {f"{prefix}{name}": tensor for name, tensor in self.packed().items()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._held:
            self._take_back()
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
        tensors, first = self.packed(), torch.zeros(1, dtype=torch.long, device=self.device)
        if self.kernel and self.kernel.rows(tensors, self.stored, first):
            self._embedding[0]._leave_to(self.kernel, tensors)

    def restore(self) -> None:
        if self._embedding[0]._is_left:
            self._embedding[0]._take_back()
        self.kernel = self._bound = None
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
        elif self._embedding[0]._is_left:
            self._embedding[0]._leave_to(self.kernel, self.packed())  # which may be in other memory now
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
