"""Sizes of a model that may differ from layer to layer: one number where they do not, as GGUF files tell them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dashq.model.gguf_layout import key_heads

if TYPE_CHECKING:
    import transformers

# Model types that have another name for the width of feed-forward networks, or none and a factor.
INNER = {
    "gpt2": "n_inner",
    "llama4_text": "intermediate_size_mlp",
    "gpt_bigcode": "n_inner",
    "falcon": "ffn_hidden_size",
    "bloom": "",
    "mpt": "",
    "qwen3_5_moe_text": "shared_expert_intermediate_size",
}
DIFFERING = {"gemma4_text", "gemma4_unified_text"}  # model types of which each layer has a configuration
WHOLE = {"minicpm3"}  # model types with latent attention, of which llama.cpp keeps all keys and values
STATES_ALONE = {"mamba", "mamba2", "falcon_mamba"}  # model types of which no layer attends
# Model types in which layers with states have no attention.
HYBRID = {"granitemoehybrid", "bamba", "nemotron_h", "jamba"}
# Of those in which a layer has states, attention, or a feed-forward network: the width of the last, by its kind.
SINGLE = {"mlp": "intermediate_size", "moe": "moe_intermediate_size"}


def head_size(config: "transformers.PretrainedConfig") -> int:
    """The columns of each head, in layers that see all of a text where others have heads of another size."""
    config = _layers(config)[-1]  # the last one does
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def shares_latents(config: "transformers.PretrainedConfig") -> bool:
    """True where heads have no keys and values of their own, but llama.cpp keeps what these are made of, once."""
    return hasattr(config, "kv_lora_rank") and config.model_type not in WHOLE


def key_size(config: "transformers.PretrainedConfig") -> int:
    """The columns of a key that llama.cpp keeps."""
    if shares_latents(config):
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    return int(config.qk_head_dim) if config.model_type in WHOLE else head_size(config)


def value_size(config: "transformers.PretrainedConfig") -> int:
    """The columns of a value that llama.cpp keeps."""
    if shares_latents(config):
        return int(config.kv_lora_rank)
    return int(getattr(config, "v_head_dim", None) or head_size(config))


def heads_of_keys(config: "transformers.PretrainedConfig") -> int | Sequence[int]:
    """The number of heads of keys in each layer: none where it has no attention."""
    kinds = getattr(config, "layer_types", None) or ()
    if shares_latents(config):
        return _at_once([int(kind == "full_attention") for kind in kinds] or [1])
    counts = [key_heads(layer) for layer in _layers(config)]
    if config.model_type == "mimo_v2_flash":  # whose layers with a window have twice as many
        counts = [
            2 * count if kind == "sliding_attention" else count for kind, count in zip(kinds, counts, strict=True)
        ]
    if "conv" in kinds or config.model_type in HYBRID:
        counts = [count if kind == "full_attention" else 0 for kind, count in zip(kinds, counts, strict=True)]
    return _at_once(counts)


def inner_size(config: "transformers.PretrainedConfig") -> int | Sequence[int]:
    """The columns between the matrices of each feed-forward network; layers that share keys may have twice as many."""
    if config.model_type == "nemotron_h":
        return [getattr(config, SINGLE[kind]) if kind in SINGLE else 0 for kind in config.layer_types]
    own = config.num_hidden_layers - getattr(config, "num_kv_shared_layers", 0)
    factor = 2 if getattr(config, "use_double_wide_mlp", False) else 1
    size = _adjusted(config) if getattr(config, "block_auto_adjust_ff_dim", False) else _size(config)
    if config.model_type == "granitemoehybrid" and config.num_local_experts == 0:
        size = config.shared_intermediate_size
    return _at_once([size * (1 if index < own else factor) for index in range(config.num_hidden_layers)])


def _size(config: "transformers.PretrainedConfig") -> int:
    """The width that a configuration names, or a multiple of the model's."""
    own = getattr(config, INNER.get(config.model_type, "intermediate_size"), None)
    own = own[0] if isinstance(own, list) else own  # of Gemma 3n, in which all are the same
    return int(own or getattr(config, "expansion_ratio", 4) * config.hidden_size)


def _adjusted(config: "transformers.PretrainedConfig") -> int:
    """Two thirds of what LFM2's configuration says, times a factor, as a multiple of a number."""
    size = int(config.block_ffn_dim_multiplier * int(2 * config.intermediate_size / 3))
    multiple: int = config.block_multiple_of
    return -(-size // multiple) * multiple


def _layers(config: "transformers.PretrainedConfig") -> Sequence["transformers.PretrainedConfig"]:
    """Each layer's configuration; the model's own where all have the same."""
    count = config.num_hidden_layers
    if config.model_type not in DIFFERING:
        return [config] * count
    return [config.per_layer_config[index] for index in range(count)]


def _at_once(sizes: Sequence[int]) -> int | Sequence[int]:
    return sizes if len({*sizes}) > 1 else sizes[0]
