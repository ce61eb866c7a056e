"""Packed embeddings of a loaded checkpoint, and the head that is the same matrix."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.func import functional_call

from dashq.data import StoredLayer
from dashq.runtime.linear import DashqLinear
from dashq.runtime.packed import PackedMatrix
from dashq.strategies import Serializer


class DashqEmbedding(PackedMatrix):
    """Takes the place of a model's embeddings: of the packed matrix only the rows of the given tokens are unpacked.

    The model's own module looks them up there, so that whatever else it does with them, such as to scale them, remains.
    """

    def __init__(self, plain: nn.Embedding, serializer: Serializer, stored: StoredLayer) -> None:
        super().__init__(serializer, stored)
        self.num_embeddings, self.embedding_dim = stored.layer.rows, stored.layer.columns
        self.padding_idx, self._computes = plain.padding_idx, plain.weight.dtype
        plain.padding_idx = None  # which counts rows of the whole matrix
        del plain.weight
        self._plain = (plain,)  # in a tuple, so that it is no submodule with weights to read
        self._constants = [name for name, _ in plain.named_buffers()]
        for name in self._constants:
            self.register_buffer(name, plain.get_buffer(name), persistent=False)

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch columns"]:
        rows = self.unpack_tensors(self.serializer.rows(self.packed(), tokens.flatten())).dequantize(self._computes)
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

    def _apply(
        self, fn: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]], recurse: bool = True
    ) -> "DashqEmbedding":
        self._computes = fn(torch.empty(0, dtype=self._computes, device=self.device)).dtype
        super()._apply(fn, recurse)
        return self


class DashqTiedHead(DashqLinear):
    """The head of a model whose embeddings are the same matrix: it holds no tensors but a kernel's, and saves none."""

    def __init__(self, embedding: DashqEmbedding, bias: bool) -> None:
        super().__init__(embedding.serializer, embedding.stored, bias)
        self._embedding = (embedding,)  # in a tuple, since it is a submodule elsewhere
        self.hold({})

    def packed(self) -> dict[str, Tensor]:
        return super().packed() if self.kernel else self._embedding[0].packed()

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
        computes = fn(torch.empty(0, dtype=self._computes, device=self.device)).dtype
        self._restore()
        PackedMatrix._apply(self, fn, recurse)
        self.use(self.kernels, computes)  # wherever the embeddings are now
        return self

    def _restore(self) -> None:
        self.kernel = None
        self.hold({})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
