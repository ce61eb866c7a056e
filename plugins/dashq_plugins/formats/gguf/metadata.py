"""The metadata of a GGUF file about a model's shape, from the configuration of transformers."""

from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from dashq.model.gguf_factors import stream_unit
from dashq.model.gguf_layout import GgufLayout
from dashq_plugins.formats.gguf.experts import expert_count, leading_layers, shared_expert_count
from dashq_plugins.formats.gguf.falcon_h1 import add_falcon_h1
from dashq_plugins.formats.gguf.gemma3n import add_gemma3n
from dashq_plugins.formats.gguf.gemma4 import add_gemma4
from dashq_plugins.formats.gguf.kimi_linear import add_kimi_linear
from dashq_plugins.formats.gguf.latent import LATENT, add_latent
from dashq_plugins.formats.gguf.layers import STATES_ALONE, heads_of_keys, inner_size, key_size, value_size
from dashq_plugins.formats.gguf.mimo2 import add_mimo2
from dashq_plugins.formats.gguf.rotary import add_rope
from dashq_plugins.formats.gguf.states import add_states
from dashq_plugins.formats.gguf.windows import add_window

if TYPE_CHECKING:
    import gguf
    import transformers


# Those in which experts score from 0 to 1, each by itself.
SIGMOID = {"glm4moe", "dots1", "minimax-m2", "lfm2moe", "exaone-moe", "afmoe", "nemotron_h_moe", "mimo2"}
# Attributes of configurations, and the writer's words for them.
SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "num_experts_per_tok": "expert_used_count",
    "top_k_experts": "expert_used_count",
    "moe_layer_interval": "interleave_moe_layer_step",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "route_scale": "expert_weights_scale",
    "shared_intermediate_size": "expert_shared_feed_forward_length",
    "clip_qkv": "clamp_kqv",
    "routed_scaling_factor": "expert_weights_scale",
    "use_parallel_residual": "parallel_residual",
    "conv_L_cache": "shortconv_l_cache",
}
OF_EXPERTS = ("expert_used_count", "expert_shared_feed_forward_length")  # that no model without experts may have
# Of norms that take the mean away, by their names.
LAYER_NORMS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
# Of norms that leave it, where their names are of the others.
MEAN_SQUARES = {
    "lfm2": "norm_eps",
    "lfm2moe": "norm_eps",
    "nemotron_h": "layer_norm_epsilon",
    "nemotron_h_moe": "layer_norm_epsilon",
    "mamba": "layer_norm_epsilon",
    "mamba2": "layer_norm_epsilon",
}
OLMO_NORM = 1e-5  # which stands in its code
ALIBI = 8.0  # which transformers takes in MPT, whatever its configuration says


def add_metadata(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    """Write all that llama.cpp has to know to compute as the model does."""
    import gguf

    config = layout.config
    # Only the folder's own name: those above it are the user's.
    writer.add_name(PurePath(getattr(config, "name_or_path", "")).name or config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if config.model_type in STATES_ALONE:  # llama.cpp asks for these of all
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
    else:
        writer.add_feed_forward_length(inner_size(config))
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(heads_of_keys(config))
        writer.add_key_length(key_size(config))
        writer.add_value_length(value_size(config))
    _add_norms(writer, layout)
    if count := expert_count(layout):
        writer.add_expert_count(_single(count))
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        writer.add_expert_feed_forward_length(_single(width))
    if count and (shared := shared_expert_count(config)):
        writer.add_expert_shared_count(shared)
        width = getattr(config, "moe_shared_expert_intermediate_size", shared * config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(width)
    if (leading := leading_layers(config)) is not None:
        writer.add_leading_dense_block_count(leading)
    for name, word in SCALES.items():
        if (value := getattr(config, name, None)) is not None and (count or word not in OF_EXPERTS):
            getattr(writer, f"add_{word}")(_single(value))
    if layout.architecture in SIGMOID:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(True)
    if layout.architecture in LATENT:
        add_latent(writer, config)
    if add := ENTRIES.get(layout.architecture):
        add(writer, config)
    add_window(writer, layout)
    add_states(writer, layout)
    add_rope(writer, layout)


def _single(value: Any) -> Any:
    """A setting, or that of all layers."""
    return value[0] if isinstance(value, list) else value


def _add_norms(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    config = layout.config
    if layout.architecture in MEAN_SQUARES:
        writer.add_layer_norm_rms_eps(getattr(config, MEAN_SQUARES[layout.architecture]))
    elif layout.architecture == "falcon-h1":
        # Norms of states, where there are any, are given what no factor changed.
        factor = 1 if config.mamba_rms_norm else stream_unit(config) ** 2
        writer.add_layer_norm_rms_eps(config.rms_norm_eps * factor)
    elif hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        own = (getattr(config, name) for name in LAYER_NORMS if hasattr(config, name))
        writer.add_layer_norm_eps(next(own, OLMO_NORM))


def _add_glm(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    writer.add_nextn_predict_layers(0)  # which transformers does not read


def _add_seeing(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    """Write how many layers take images besides the first."""
    writer.add_num_deepstack_layers(len(config.deepstack_visual_indexes))


def _add_mpt(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    """Write how far each position lowers attention, and the bounds of queries, keys and values."""
    writer.add_max_alibi_bias(ALIBI)
    if config.attn_config.clip_qkv is not None:
        writer.add_clamp_kqv(config.attn_config.clip_qkv)


# What is said of one architecture alone.
ENTRIES = {
    "falcon-h1": add_falcon_h1,
    "gemma3n": add_gemma3n,
    "gemma4": add_gemma4,
    "glm4moe": _add_glm,
    "mimo2": add_mimo2,
    "mpt": _add_mpt,
    "qwen3vl": _add_seeing,
    "kimi-linear": add_kimi_linear,
}
