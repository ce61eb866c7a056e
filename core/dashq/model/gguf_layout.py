"""The tensors of a GGUF file: their names, and where llama.cpp holds other values than transformers does."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from dashq.model.gguf_factors import held
from dashq.model.gguf_states import BARE, FILTERS, state_name, state_rows, state_sizes, state_values

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
    "gpt-oss",
    "gemma4",
    "minimax-m2",
    "gpt2",
    "bloom",
    "falcon",
    "deepseek2",
    "minicpm3",
    "qwen3next",
    "qwen35",
    "qwen35moe",
    "granitehybrid",
    "nemotron_h",
    "nemotron_h_moe",
    "mamba",
    "mamba2",
    "falcon-h1",
)
# Those whose rotary heads llama.cpp turns; in those of transformers both halves of a head lie apart.
INTERLEAVED = {"llama", "mistral3", "granite", "granitemoe", "granitehybrid", "smollm3", "arcee", "olmo"}
# Those whose norms hold the factor in the file, and the factor less one in transformers.
NEIGHBOURS = {"helium"}  # model types of which transformers turns the same columns together
SHIFTED = {"gemma", "gemma2", "gemma3", "nemotron", "qwen3next", "qwen35", "qwen35moe"}
WHOLE = "linear_attn.norm.weight"  # a norm that holds the factor in both
# One tensor in transformers, two or three in most files.
FUSED = {
    "experts.gate_up_proj": ("experts.gate_proj", "experts.up_proj"),
    "shared_mlp.input_linear": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "self_attn.conv1d": ("self_attn.q_conv1d", "self_attn.k_conv1d", "self_attn.v_conv1d"),
    "self_attn.kv_b_proj": ("self_attn.k_b_proj", "self_attn.v_b_proj"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "alone.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
}
# Endings and parts of names that the tables of `gguf` have otherwise.
RENAMED = (
    (r"(experts\.\w+|e_score_correction)_bias$", r"\1.bias"),
    (r"expert_bias$", "expert_bias.bias"),
    (r"gate\.moe_statics", "moe_statics"),
    (r"block_sparse_moe\.experts", "mlp.experts"),
    (r"^transformer\.(h\.\d+\.post_attention_layernorm|word_embeddings_layernorm)", r"\1"),
    (r"block_sparse_moe\.router", "block_sparse_moe.router.layer"),
    (r"self_attn\.forget_gate", "self_attn"),
    (r"\.dt_bias$", ".dt_proj.bias"),
    (r"mixer\.experts", "mlp.experts"),
    (r"^model(\.layers\.\d+\.mixer)", r"backbone\1"),
)
# Model types of which every head has keys of its own, or all heads share one.
ALONE = {"gpt2", "gpt_bigcode", "gpt_neox", "bloom", "falcon", "mpt"}
ROWS = ("shared_expert_gate.weight", "moe_statics.e_score_correction_bias")  # one, which the file has as a vector
PER_LAYER = "embed_tokens_per_layer.weight"  # the table whose rows hold a part for each layer
ALTERNATING = {"gpt-oss"}  # those whose stacks of experts hold gates and the rest in turn
# Endings of matrices that hold inputs before outputs in transformers.
TRANSPOSED = {
    "gpt-oss": ("experts.gate_up_proj", "experts.down_proj"),
    "gpt2": ("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    "llama4": ("experts.gate_up_proj", "experts.down_proj"),
}
# One matrix for queries, keys and values in each head, or in each group of heads that share keys, one after the other.
GROUPED = {"gptneox": "query_key_value", "bloom": "query_key_value", "falcon": "query_key_value", "starcoder": "c_attn"}
# Parameters that are one number in each layer: what an activation learned, in the file's entries.
LEARNED = r"model\.layers\.(\d+)\.mlp\.act_fn\.(\w+)"
# Vectors that scale what a matrix is given, or gives, and have its name in the file.
SCALES = {"router.scale": "router.proj", "router.per_expert_scale": "experts.down_proj"}
KEYS_AND_VALUES = "self_attn.kv_b_proj.weight"  # of latent attention, from what the cache holds
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
        parameter = state_name(self.config, parameter)
        for pattern, replacement in RENAMED:
            parameter = re.sub(pattern, replacement, parameter)
        halves = [(whole, half) for whole, both in FUSED.items() if whole in parameter for half in both]
        names = [self._name(parameter.replace(whole, half)) for whole, half in halves]
        if not halves or None in names:  # no two in one, or two that stay one in the file
            names = [self._name(parameter)]
        return tuple(name for name in names if name)

    def entry(self, parameter: str) -> tuple[str, int] | None:
        """The entry with a number for each layer that holds a parameter in place of a tensor, and the layer."""
        match = re.fullmatch(LEARNED, parameter)
        return (f"xielu.{match[2]}", int(match[1])) if match else None

    def to_file(self, parameter: str, tensor: Shaped[Tensor, "..."]) -> Mapping[str, Shaped[Tensor, "..."]]:
        """The file's tensors that hold the values of a parameter, by name; matrices are turned row by row.

        So they may be packed: what rows hold does not count. Those that are transposed in transformers are given, and
        come back from `from_file`, with rows first (`transposed`).
        """
        order = self._rows(parameter, len(tensor))
        tensor = self._changed(parameter, tensor if order is None else tensor[order], back=False)
        names = self.names(parameter)
        if len(names) == 1:
            return {names[0]: tensor}
        if self.turns_keys(parameter):
            halves: Sequence[Tensor] = _keys_and_values(tensor, self.config)
        elif self._alternates:
            halves = (tensor[:, ::2], tensor[:, 1::2])
        else:
            axis = _split_axis(parameter)
            halves = tensor.split(state_sizes(self.config, parameter, tensor.shape[axis]), dim=axis)
        return dict(zip(names, halves, strict=True))

    def from_file(self, parameter: str, parts: Sequence[Shaped[Tensor, "..."]]) -> Shaped[Tensor, "..."]:
        """The inverse of `to_file`."""
        if len(parts) == 1:
            tensor = parts[0]
        elif self.turns_keys(parameter):
            keys, values = parts
            tensor = torch.cat([keys.mT, values], dim=1).flatten(0, 1)
        elif self._alternates:
            tensor = torch.stack(list(parts), dim=2).flatten(1, 2)
        else:
            tensor = torch.cat(list(parts), dim=_split_axis(parameter))
        tensor = self._changed(parameter, tensor, back=True)
        order = self._rows(parameter, len(tensor))
        return tensor if order is None else tensor[order.argsort()]

    def transposed(self, parameter: str) -> bool:
        """True for matrices that transformers holds with inputs before outputs."""
        return parameter.endswith(TRANSPOSED.get(self.architecture, ()))

    def turns_keys(self, parameter: str) -> bool:
        """True for the matrix of keys and values of which the file holds each head's keys column by column.

        Its rows cannot be packed.
        """
        return parameter.endswith(KEYS_AND_VALUES) and len(self.names(parameter)) > 1

    def _name(self, parameter: str) -> str | None:
        name = self._names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        return name if name is None or name.endswith((".weight", ".bias", *BARE)) else f"{name}.weight"

    @property
    def _alternates(self) -> bool:
        return self.architecture in ALTERNATING

    @cached_property
    def _names(self) -> "gguf.TensorNameMap":
        import gguf

        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        return gguf.get_tensor_name_map(kind, self.config.num_hidden_layers)

    def _rows(self, parameter: str, count: int) -> Int[Tensor, " rows"] | None:
        """The order of a tensor's rows in the file.

        llama.cpp interleaves the two halves of rotary heads, or has all queries first, then all keys, then all values.
        """
        part = parameter.split(".")[-2]
        if part == GROUPED.get(self.architecture):
            keys = key_heads(self.config)
            groups = torch.arange(count).view(keys, self.config.num_attention_heads // keys + 2, -1)
            return torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(part)
        if self.architecture not in INTERLEAVED or self.config.model_type in NEIGHBOURS or heads is None:
            return state_rows(self.architecture, self.config, parameter, count)
        rows = torch.arange(count).view(getattr(self.config, heads), -1)
        share = getattr(self.config, "rope_parameters", {}).get("partial_rotary_factor", 1.0)
        turned, still = rows.tensor_split([int(rows.shape[1] * share)], dim=1)
        return torch.cat([turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1), still], dim=1).flatten()

    def _changed(self, parameter: str, tensor: Shaped[Tensor, "..."], back: bool) -> Shaped[Tensor, "..."]:
        """Values of a parameter as the file has them, or `back`."""
        if self.architecture in SHIFTED and parameter.endswith("norm.weight") and not parameter.endswith(WHOLE):
            return tensor - 1 if back else tensor.float() + 1
        if parameter.endswith(ROWS):
            return tensor.view(1, -1) if back else tensor.flatten()
        if parameter.endswith(PER_LAYER):
            if back:
                return tensor[: self.config.vocab_size_per_layer_input]
            others = max(self.config.vocab_size - len(tensor), 0)  # that are given what the first token is
            return torch.cat([tensor, tensor[:1].expand(others, -1)])
        if self.architecture == "falcon-h1":
            tensor = held(self.config, parameter, tensor, back)
        return state_values(self.architecture, self.config, parameter, tensor, back)


def key_heads(config: "transformers.PretrainedConfig") -> int:
    """The number of heads of keys in each layer."""
    if getattr(config, "new_decoder_architecture", False):  # of Falcon
        return int(config.num_kv_heads)
    if config.model_type in ALONE:
        return 1 if getattr(config, "multi_query", False) else int(config.num_attention_heads)
    return int(config.num_key_value_heads)


def _split_axis(parameter: str) -> int:
    """The axis along which the file's tensors for a parameter lie one after the other: that of channels or rows."""
    return 0 if parameter.endswith(FILTERS) else -2


def _keys_and_values(
    matrix: Shaped[Tensor, "rows columns"], config: "transformers.PretrainedConfig"
) -> tuple[Shaped[Tensor, "heads columns keys"], Shaped[Tensor, "heads values columns"]]:
    """The keys of all heads, turned, and their values, of a matrix that has those of one head after the other."""
    heads = matrix.unflatten(0, (config.num_attention_heads, -1))
    return heads[:, : config.qk_nope_head_dim].mT, heads[:, config.qk_nope_head_dim :]
