"""The tensors of a GGUF file for one of transformers: two where a stack fuses what the file keeps apart."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout

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
    """The tensors of a model of this configuration; raises a `PlanError` where its type cannot be written."""

    def __init__(self, config: "transformers.PretrainedConfig") -> None:
        if config.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise PlanError(f"cannot write GGUF files of model type {config.model_type!r}. Known: {known}")
        self.config = config
        self.architecture, self.activation = ARCHITECTURES[config.model_type]
        self._layout = GgufLayout(self.architecture, config)

    def in_file(self, name: str) -> Sequence[str]:
        """The file's names of a tensor: two where a stack of experts fuses what it keeps apart.

        Raises a `PlanError` for a tensor that the file has no place for.
        """
        parts = ("gate_proj", "up_proj") if name.endswith(FUSED) else ("",)
        places = [self._layout.name(name.replace("gate_up_proj", part) if part else name) for part in parts]
        if None in places:
            raise PlanError(f"GGUF's {self.architecture} has no place for the tensor {name}")
        return [str(place) if str(place).endswith((".weight", ".bias")) else f"{place}.weight" for place in places]

    def to_file(self, name: str, tensor: Shaped[Tensor, "..."]) -> Mapping[str, Tensor]:
        """The tensors of the file that hold a tensor, by the file's names."""
        tensor = self._layout.to_file(name, tensor)
        names = self.in_file(name)
        return dict(zip(names, tensor.chunk(len(names), dim=1) if len(names) > 1 else (tensor,), strict=True))

    def from_file(self, name: str, tensors: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
        """The inverse of `to_file`."""
        tensor = torch.cat(list(tensors), dim=1) if len(tensors) > 1 else tensors[0]
        return self._layout.from_file(name, tensor)


def place(name: str) -> tuple[str, int | None]:
    """The tensor of transformers that holds a tensor of ours: that of its name, or a stack and the expert in it."""
    stack, _, expert = name.removesuffix(".weight").rpartition(".")
    return (stack, int(expert)) if expert.isdecimal() else (name, None)
