"""The tensors of a GGUF file: their names, and where llama.cpp holds other values than transformers does."""

import re
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
INTERLEAVED = {"llama", "mistral3", "granite", "smollm3", "arcee"}
# Those whose norms hold the factor in the file, and the factor less one in transformers.
SHIFTED = {"gemma", "gemma2", "gemma3", "nemotron"}
FUSED = "experts.gate_up_proj"  # one stack in transformers, two in most files
# Those whose stacks of experts hold inputs before outputs in transformers, gates and the rest in turn.
TRANSPOSED = {"gpt-oss"}
# Vectors that scale what a matrix is given, or gives, and have its name in the file.
SCALES = {"router.scale": "router.proj", "router.per_expert_scale": "experts.down_proj"}
TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # what a configuration holds


@dataclass(frozen=True, eq=False)
class GgufLayout:
    """The tensors of an `architecture`, as GGUF calls it, for a model of this configuration."""

    architecture: str
    config: "transformers.PretrainedConfig"

    def names(self, parameter: str) -> tuple[str, ...]:
        """The names in the file for a parameter of transformers: two for a fused stack, none where it has no place."""
        for scale, matrix in SCALES.items():
            if parameter.endswith(scale):
                name = self._names.get_name(parameter.replace(scale, matrix))
                return (f"{name}.scale",) if name else ()
        parameter = re.sub(r"(experts\.\w+|e_score_correction)_bias$", r"\1.bias", parameter)
        halves = ("gate_proj", "up_proj") if FUSED in parameter else ()
        names = [self._name(parameter.replace("gate_up_proj", half)) for half in halves]
        if not halves or None in names:  # no stack of two, or one that stays one in the file
            names = [self._name(parameter)]
        return tuple(name for name in names if name)

    def to_file(self, parameter: str, tensor: Shaped[Tensor, "..."]) -> Mapping[str, Shaped[Tensor, "..."]]:
        """The file's tensors that hold the values of a parameter, by name; matrices are turned row by row.

        So they may be packed: what rows hold does not count. Stacks that are transposed in transformers are given, and
        come back from `from_file`, with rows first (`transposed`).
        """
        order = self._rows(parameter, len(tensor))
        tensor = self._changed(parameter, tensor if order is None else tensor[order], back=False)
        names = self.names(parameter)
        if len(names) == 1:
            return {names[0]: tensor}
        halves = (tensor[:, ::2], tensor[:, 1::2]) if self._alternates else tensor.chunk(2, dim=1)
        return dict(zip(names, halves, strict=True))

    def from_file(self, parameter: str, parts: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
        """The inverse of `to_file`."""
        if len(parts) == 1:
            tensor = parts[0]
        elif self._alternates:
            tensor = torch.stack(list(parts), dim=2).flatten(1, 2)
        else:
            tensor = torch.cat(list(parts), dim=1)
        tensor = self._changed(parameter, tensor, back=True)
        order = self._rows(parameter, len(tensor))
        return tensor if order is None else tensor[order.argsort()]

    def transposed(self, parameter: str) -> bool:
        """True for a stack of experts that transformers holds with inputs before outputs."""
        return self.architecture in TRANSPOSED and parameter.endswith(("experts.gate_up_proj", "experts.down_proj"))

    def _name(self, parameter: str) -> str | None:
        name = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        return name if name is None or name.endswith((".weight", ".bias")) else f"{name}.weight"

    @property
    def _alternates(self) -> bool:
        return self.architecture in TRANSPOSED

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
