"""The tensors of a GGUF file: their names, and where llama.cpp holds other values than transformers does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

if TYPE_CHECKING:
    import gguf
    import transformers

# Architectures that are known to be read right.
ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "phi3",
    "gemma2",
    "gemma3",
    "lfm2",
    "nemotron",
    "stablelm",
    "starcoder2",
)
# Those whose rotary heads llama.cpp turns; in those of transformers both halves of a head lie apart.
INTERLEAVED = {"llama", "granite", "smollm3", "arcee"}
# Those whose norms hold the factor in the file, and the factor less one in transformers.
SHIFTED = {"gemma", "gemma2", "gemma3", "nemotron"}
FUSED = "experts.gate_up_proj"  # one stack in transformers, two in the file
TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # what a configuration holds


@dataclass(frozen=True, eq=False)
class GgufLayout:
    """The tensors of an `architecture`, as GGUF calls it, for a model of this configuration."""

    architecture: str
    config: "transformers.PretrainedConfig"

    def names(self, parameter: str) -> tuple[str, ...]:
        """The names in the file for a parameter of transformers: two for a fused stack, none where it has no place."""
        halves = ("gate_proj", "up_proj") if parameter.endswith(FUSED) else ("",)
        parts = [parameter.replace("gate_up_proj", half) if half else parameter for half in halves]
        names = [self._names.get_name(part, try_suffixes=(".weight", ".bias")) for part in parts]
        return tuple(name if name.endswith((".weight", ".bias")) else f"{name}.weight" for name in names if name)

    def to_file(self, parameter: str, tensor: Shaped[Tensor, "..."]) -> Mapping[str, Shaped[Tensor, "..."]]:
        """The file's tensors that hold the values of a parameter, by name; matrices are turned row by row.

        So they may be packed: what rows hold does not count.
        """
        order = self._rows(parameter, len(tensor))
        tensor = self._changed(parameter, tensor if order is None else tensor[order], back=False)
        names = self.names(parameter)
        return dict(zip(names, tensor.chunk(len(names), dim=1) if len(names) > 1 else (tensor,), strict=True))

    def from_file(self, parameter: str, parts: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
        """The inverse of `to_file`."""
        tensor = torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]
        tensor = self._changed(parameter, tensor, back=True)
        order = self._rows(parameter, len(tensor))
        return tensor if order is None else tensor[order.argsort()]

    @cached_property
    def _names(self) -> "gguf.TensorNameMap":
        import gguf

        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.get_tensor_name_map(kind, self.config.num_hidden_layers)

    def _rows(self, parameter: str, count: int) -> Int[Tensor, " rows"] | None:
        """The order of a tensor's rows in the file, where llama.cpp interleaves the two halves of rotary heads."""
        part = parameter.split(".")[-2]
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(part)
        if self.architecture not in INTERLEAVED or heads is None:
            return None
        return torch.arange(count).view(getattr(self.config, heads), 2, -1).transpose(1, 2).flatten()

    def _changed(self, parameter: str, tensor: Shaped[Tensor, "..."], back: bool) -> Shaped[Tensor, "..."]:
        """Values of a parameter as the file has them, or `back`."""
        if self.architecture in SHIFTED and parameter.endswith("norm.weight"):
            return tensor - 1 if back else tensor.float() + 1
        if parameter.endswith("shared_expert_gate.weight"):  # one row, which llama.cpp keeps as a vector
            return tensor.view(1, -1) if back else tensor.flatten()
        if parameter.endswith("conv.conv.weight"):  # one filter for each channel
            return tensor.unsqueeze(1) if back else tensor.squeeze(1)
        return tensor
