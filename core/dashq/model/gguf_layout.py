"""The tensors of a GGUF file: their names, and where llama.cpp holds other values than transformers does."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

if TYPE_CHECKING:
    import gguf
    import transformers

INTERLEAVED = {"llama"}  # architectures whose rotary heads llama.cpp turns
SHIFTED = {"gemma2", "gemma3"}  # those whose norms hold the factor in the file, and the factor less one in transformers


@dataclass(frozen=True, eq=False)
class GgufLayout:
    """The tensors of an `architecture`, as GGUF calls it, for a model of this configuration."""

    architecture: str
    config: "transformers.PretrainedConfig"

    def name(self, parameter: str) -> str | None:
        """The file's name of a parameter of transformers; None where GGUF has no place for it."""
        name: str | None = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        return name

    def to_file(self, parameter: str, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The values of a parameter as the file has them; rows alone are turned, whatever they hold."""
        order = self._rows(parameter, len(tensor))
        tensor = tensor if order is None else tensor[order]
        return tensor.float() + 1 if self._adds_one(parameter) else tensor

    def from_file(self, parameter: str, tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The inverse of `to_file`."""
        order = self._rows(parameter, len(tensor))
        tensor = tensor if order is None else tensor[order.argsort()]
        return tensor - 1 if self._adds_one(parameter) else tensor

    @cached_property
    def _names(self) -> "gguf.TensorNameMap":
        import gguf

        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.get_tensor_name_map(kind, self.config.num_hidden_layers)

    def _rows(self, parameter: str, count: int) -> Int[Tensor, " rows"] | None:
        """The order of a tensor's rows in the file, where llama.cpp interleaves the two halves of rotary heads."""
        part = parameter.split(".")[-2]
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}.get(part)
        if self.architecture not in INTERLEAVED or heads is None:
            return None
        return torch.arange(count).view(heads, 2, -1).transpose(1, 2).flatten()

    def _adds_one(self, parameter: str) -> bool:
        return self.architecture in SHIFTED and parameter.endswith("norm.weight")
