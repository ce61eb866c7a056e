"""Names of tensors in a GGUF file, and where llama.cpp wants them otherwise than transformers has them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from dashq import PlanError

if TYPE_CHECKING:
    import transformers

# The architecture in the file's words, and what its feed-forward layers compute, by the model type of transformers.
ARCHITECTURES: Mapping[str, tuple[str, str]] = {
    "llama": ("llama", "silu"),
    "mistral": ("llama", "silu"),
    "mixtral": ("llama", "silu"),
    "qwen2": ("qwen2", "silu"),
    "qwen3": ("qwen3", "silu"),
    "qwen3_moe": ("qwen3moe", "silu"),
    "gemma3_text": ("gemma3", "gelu_pytorch_tanh"),
}
FUSED = "experts.gate_up_proj"


class Names:
    """Tensor names of one architecture, and the rows that llama.cpp wants in another order."""

    def __init__(self, config: "transformers.PretrainedConfig") -> None:
        import gguf

        if config.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise PlanError(f"cannot write GGUF files of model type {config.model_type!r}. Known: {known}")
        self.config = config
        self.architecture, self.activation = ARCHITECTURES[config.model_type]
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._map = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def in_file(self, name: str) -> Sequence[str]:
        """The file's names of a tensor: two where a stack of experts fuses what it keeps apart.

        Raises a `PlanError` for a tensor that the file has no place for.
        """
        parts = ("gate_proj", "up_proj") if name.endswith(FUSED) else ("",)
        places = [self._map.get_name(name.replace("gate_up_proj", part) if part else name, _SUFFIXES) for part in parts]
        if None in places:
            raise PlanError(f"GGUF's {self.architecture} has no place for the tensor {name}")
        return [str(place) if str(place).endswith(_SUFFIXES) else f"{place}.weight" for place in places]

    def to_file(self, name: str, tensor: Shaped[Tensor, "..."]) -> Mapping[str, Tensor]:
        """The tensors of the file that hold a tensor, by the file's names."""
        order = self._rows(name, len(tensor))
        tensor = tensor if order is None else tensor[order]
        names = self.in_file(name)
        return dict(zip(names, tensor.chunk(len(names), dim=1) if len(names) > 1 else (tensor,), strict=True))

    def from_file(self, name: str, tensors: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
        """The inverse of `to_file`."""
        tensor = torch.cat(list(tensors), dim=1) if len(tensors) > 1 else tensors[0]
        order = self._rows(name, len(tensor))
        return tensor if order is None else tensor[order.argsort()]

    def adds_one(self, name: str) -> bool:
        """True where the file holds a norm's factor and transformers holds the factor less one."""
        return self.architecture == "gemma3" and name.endswith("norm.weight")

    def _rows(self, name: str, count: int) -> Int[Tensor, " rows"] | None:
        """The order of a tensor's rows in the file, where llama.cpp interleaves the two halves of rotary heads."""
        part = name.split(".")[-2]
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}.get(part)
        if self.architecture != "llama" or heads is None:
            return None
        return torch.arange(count).view(heads, 2, -1).transpose(1, 2).flatten()


def place(name: str) -> tuple[str, int | None]:
    """The tensor of transformers that holds a tensor of ours: that of its name, or a stack and the expert in it."""
    stack, _, expert = name.removesuffix(".weight").rpartition(".")
    return (stack, int(expert)) if expert.isdecimal() else (name, None)


_SUFFIXES = (".weight", ".bias")
