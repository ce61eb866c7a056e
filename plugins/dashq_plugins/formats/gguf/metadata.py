"""The metadata of a GGUF file about a model's shape, from the configuration of transformers."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout
from dashq_plugins.formats.gguf.gemma4 import add_gemma4, check_gemma4
from dashq_plugins.formats.gguf.latent import LATENT, add_latent, check_latent
from dashq_plugins.formats.gguf.layers import head_size, heads_of_keys, inner_size, key_size, value_size
from dashq_plugins.formats.gguf.llama4 import check_llama4
from dashq_plugins.formats.gguf.mimo2 import add_mimo2, check_mimo2
from dashq_plugins.formats.gguf.names import FAMILIES
from dashq_plugins.formats.gguf.rotary import add_rope, check_rope
from dashq_plugins.formats.gguf.states import add_states, check_states

if TYPE_CHECKING:
    import gguf
    import transformers


# Those that are told which layers see no further than a window.
WINDOWS = {"gemma2", "gemma3", "mimo2", "gemma4", "olmo2", "exaone-moe", "afmoe"}
SLIDING = ("sliding_attention",)  # the layers of those that do not say of which kind they are
# Those in which experts score from 0 to 1, each by itself.
SIGMOID = {"glm4moe", "dots1", "minimax-m2", "lfm2moe", "exaone-moe", "afmoe", "nemotron_h_moe", "mimo2"}
# Those in which llama.cpp takes for granted that all layers have a window but every second, or every fourth.
PERIODS = {"gpt-oss": 2, "cohere2": 4, "exaone4": 4, "afmoe": 4}
EXAONE_LAYERS = 64  # of the one model of exaone4 that has windows in llama.cpp
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
    "first_k_dense_replace": "leading_dense_block_count",
    "num_dense_layers": "leading_dense_block_count",
    "moe_layer_start_index": "leading_dense_block_count",
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
ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation", "mlp_hidden_act")
# Of norms that take the mean away, by their names.
LAYER_NORMS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
# Of norms that leave it, where their names are of the others.
MEAN_SQUARES = {
    "lfm2": "norm_eps",
    "lfm2moe": "norm_eps",
    "nemotron_h": "layer_norm_epsilon",
    "nemotron_h_moe": "layer_norm_epsilon",
}
OLMO_NORM = 1e-5  # which stands in its code
CONTEXTS = {"mpt": "max_seq_len", "bloom": "seq_length"}  # model types with a word of their own
BLOOM_CONTEXT = 2048  # of a configuration without it
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")  # beside those, and as wide
LEADING = "first_k_dense_replace"  # how many layers have no experts
SHARING = {"dots1", "afmoe", "exaone-moe", "glm4moe"}  # that llama.cpp does not load without those
EQUAL_HEADS = {"olmoe", "dots1"}
NO_ROPE_STEP = 4  # every fourth layer of SmolLM3 turns nothing
# Settings that give biases to architectures for which llama.cpp has no place there.
BIASES = {
    "attention_bias": {
        *("command-r", "cohere2", "olmo", "olmo2", "olmoe", "dots1", "hunyuan-dense", "hunyuan-moe", "afmoe", "arcee"),
        *("qwen3", "qwen3moe", "qwen3vl", "qwen3next", "qwen35", "qwen35moe"),
        *("gemma", "gemma2", "gemma3", "gemma4", "smollm3"),
        *LATENT,
        *("llama4", "apertus", "mimo2"),
    },
    "attention_out_bias": {"seed_oss"},
    "mlp_bias": {"arcee", "smollm3", "seed_oss", *LATENT},
    "use_bias": {"ernie4_5", "ernie4_5-moe"},
    "conv_bias": {"lfm2", "lfm2moe"},
    "bias": {"falcon"},
}
# Those in which llama.cpp wants a head beside the embeddings.
UNTIED = {
    *("qwen2moe", "olmoe", "gpt-oss", "gptneox", "olmo2", "exaone-moe"),
    *("stablelm", "nemotron", "phi2", "dots1", "minimax-m2", "mimo2", "apertus"),
}
NEMOTRON_H = {"use_conv_bias": True, "use_bias": False, "mlp_bias": False, "mamba_hidden_act": "silu"}
# Settings of which llama.cpp takes one value for granted.
GRANTED: Mapping[str, Mapping[str, Any]] = {
    "llama4": {
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "gpt-oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
    "ernie4_5-moe": {"moe_layer_interval": 1},
    "lfm2moe": {"use_expert_bias": True, "routed_scaling_factor": 1.0},
    "afmoe": {"mup_enabled": True},
    "jais2": {"attention_bias": True, "mlp_bias": True},
    "gptneox": {"attention_bias": True},
    "gpt2": {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    "starcoder": {"scale_attn_weights": True},
    "bloom": {"apply_residual_connection_post_layernorm": False},
    "falcon": {"alibi": False, "parallel_attn": True},
    "minicpm3": {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    "jamba": {"mamba_conv_bias": True, "mamba_proj_bias": False},
    "granitehybrid": {"time_step_limit": (0.0, math.inf), "mamba_conv_bias": True, "mamba_proj_bias": False},
    "nemotron_h": NEMOTRON_H,
    "nemotron_h_moe": NEMOTRON_H,
    "mpt": {"alibi": True, "softmax_scale": None, "qk_ln": False},
}
# What is checked of one architecture alone.
CHECKS = {"gemma4": check_gemma4, "llama4": check_llama4, "mimo2": check_mimo2}
ATTENTION = "attn_config"  # the part of MPT's configuration that says how it attends
ALIBI = 8.0  # which transformers takes in MPT, whatever its configuration says


def check_config(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than the configuration says."""
    config, family = layout.config, FAMILIES[layout.config.model_type]
    check_rope(layout)
    activation = next((own for name in ACTIVATIONS if (own := getattr(config, name, None))), family.activation)
    if activation != family.activation:
        raise PlanError(f"llama.cpp computes {family.activation} in {family.architecture}, and this model {activation}")
    if layout.architecture in LATENT:
        check_latent(layout)
    else:
        _check_experts(layout)
    # llama.cpp recognizes Gemma 2 and 3 27B by their layers, and divides their queries by the root of another width.
    largest = (layout.architecture, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62))
    width = config.hidden_size // config.num_attention_heads if largest else head_size(config)
    if (scalar := getattr(config, "query_pre_attn_scalar", width)) != width:
        raise PlanError(f"llama.cpp divides queries by the root of {width}, and this model by that of {scalar}")
    if layout.architecture in PERIODS:
        _check_windows(layout)
    check_states(layout)
    if layout.architecture in WINDOWS and "sliding_attention" not in (getattr(config, "layer_types", None) or SLIDING):
        raise PlanError(
            f"llama.cpp wants layers with a window in {layout.architecture}, and no layer of this model has one"
        )
    _check_own(layout)


def _check_windows(layout: GgufLayout) -> None:
    """Refuse layers with windows where llama.cpp has none, and the other way round."""
    config, period = layout.config, PERIODS[layout.architecture]
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if layout.architecture == "exaone4" and config.num_hidden_layers != EXAONE_LAYERS:
        if any(slides) or config.sliding_window:
            raise PlanError(
                f"llama.cpp has windows in exaone4 where there are {EXAONE_LAYERS} layers, and nowhere else"
            )
    elif slides != [(index + 1) % period != 0 for index in range(config.num_hidden_layers)]:
        raise PlanError(
            f"llama.cpp gives all layers of {layout.architecture} a window but each whose number {period} divides, and "
            "this model others"
        )


def _check_own(layout: GgufLayout) -> None:
    """Refuse what llama.cpp takes for granted, or has no place for, in one architecture."""
    config = layout.config
    if layout.architecture == "smollm3":
        turned = [int((index + 1) % NO_ROPE_STEP != 0) for index in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != turned:
            raise PlanError(f"llama.cpp turns all layers of smollm3 but every {NO_ROPE_STEP}th, and this model others")
    if layout.architecture in EQUAL_HEADS and config.num_key_value_heads != config.num_attention_heads:
        raise PlanError(
            f"llama.cpp wants as many heads of keys as of queries in {layout.architecture}, and this model has fewer"
        )
    if getattr(config, "qk_layernorm", False) or (layout.architecture == "command-r" and config.use_qk_norm):
        raise PlanError("cannot write norms of queries and keys of each head to a GGUF file")
    if layout.architecture == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        raise PlanError("llama.cpp caps the logits, and those of attention, in gemma2, and this model does not")
    for setting, architectures in BIASES.items():
        if layout.architecture in architectures and getattr(config, setting, False):
            raise PlanError(f"llama.cpp has no place for the biases of {layout.architecture}, which {setting} gives it")
    if check := CHECKS.get(layout.architecture):
        check(config)
    if config.tie_word_embeddings and layout.architecture in UNTIED:
        raise PlanError(
            f"llama.cpp wants a head of its own in {layout.architecture}, and this model's embeddings serve as head"
        )
    for name, value in GRANTED.get(layout.architecture, {}).items():
        if (own := getattr(getattr(config, ATTENTION, config), name, value)) != value:
            raise PlanError(f"llama.cpp computes {layout.architecture} with {name} = {value}, and here it is {own}")


def _check_experts(layout: GgufLayout) -> None:
    """Refuse mixtures whose experts are chosen otherwise, or lie in other layers."""
    config = layout.config
    if getattr(config, "norm_topk_prob", normalizes := FAMILIES[config.model_type].normalizes) != normalizes:
        does, other = ("lets", "does not") if normalizes else ("does not let", "does")
        raise PlanError(f"llama.cpp {does} the weights of a token's experts add up to 1, and this model {other}")
    if (groups := getattr(config, "n_group", 1)) != 1:
        raise PlanError(
            f"llama.cpp chooses among all experts in {layout.architecture}, and this model in {groups} groups"
        )
    for name in ("num_experts", "num_experts_per_tok"):
        if isinstance(counts := getattr(config, name, None), list) and len({*counts}) > 1:
            raise PlanError(f"llama.cpp wants the same {name} in all layers, and this model has {counts}")
    if layout.architecture in SHARING and not _shared_experts(config):
        raise PlanError(
            f"llama.cpp wants experts that all tokens have in {layout.architecture}, and this model has none"
        )
    kinds: list[str] = getattr(config, "mlp_layer_types", None) or []
    if hasattr(config, LEADING) and "dense" in kinds[_setting(config, LEADING) :]:
        raise PlanError(f"llama.cpp has experts in all layers behind the first of {layout.architecture} that has them")
    last = config.num_hidden_layers - 1
    if getattr(config, "moe_layer_end_index", last) not in (-1, last):
        raise PlanError(f"llama.cpp has experts in all layers behind the first of {layout.architecture} that has them")


def add_metadata(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    """Write all that llama.cpp has to know to compute as the model does."""
    import gguf

    config = layout.config
    # Only the folder's own name: those above it are the user's.
    writer.add_name(PurePath(getattr(config, "name_or_path", "")).name or config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner_size(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(heads_of_keys(config))
    writer.add_key_length(key_size(config))
    writer.add_value_length(value_size(config))
    _add_norms(writer, layout)
    if experts := _experts(layout):
        writer.add_expert_count(_single(experts))
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        writer.add_expert_feed_forward_length(_single(width))
    if experts and (shared := _shared_experts(config)):
        writer.add_expert_shared_count(shared)
        width = getattr(config, "moe_shared_expert_intermediate_size", shared * config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(width)
    for name, word in SCALES.items():
        if (value := _setting(config, name)) is not None and (experts or word not in OF_EXPERTS):
            getattr(writer, f"add_{word}")(_single(value))
    if layout.architecture in SIGMOID:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(True)
    if layout.architecture == "mpt":
        _add_mpt(writer, config)
    if layout.architecture == "glm4moe":
        writer.add_nextn_predict_layers(0)  # which transformers does not read
    if layout.architecture == "gemma4":
        add_gemma4(writer, config)
    if layout.architecture in LATENT:
        add_latent(writer, config)
    if layout.architecture == "mimo2":
        add_mimo2(writer, config)
    if layout.architecture == "qwen3vl":
        writer.add_num_deepstack_layers(len(config.deepstack_visual_indexes))
    _add_window(writer, layout)
    add_states(writer, layout)
    add_rope(writer, layout)


def _experts(layout: GgufLayout) -> Any:
    """The number of experts, or of those in each layer; None where no layer has any."""
    count = next((count for name in EXPERTS if (count := getattr(layout.config, name, None))), None)
    # Nemotron-H counts experts that no layer has, and Jamba calls one expert what is none.
    return None if layout.architecture == "nemotron_h" or (layout.architecture == "jamba" and count == 1) else count


def _setting(config: "transformers.PretrainedConfig", name: str) -> Any:
    """A setting, or None; of layers without experts, that of the list of layers where there is one."""
    kinds = getattr(config, "mlp_layer_types", None)
    if name == LEADING and hasattr(config, LEADING) and kinds:
        return [*kinds, "sparse"].index("sparse")
    return getattr(config, name, None)


def _shared_experts(config: "transformers.PretrainedConfig") -> int:
    """The number of experts that all tokens have."""
    return next((count for name in SHARED if (count := getattr(config, name, None))), 0)


def _single(value: Any) -> Any:
    """A setting, or that of all layers."""
    return value[0] if isinstance(value, list) else value


def _add_mpt(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    """Write how far each position lowers attention, and the bounds of queries, keys and values."""
    writer.add_max_alibi_bias(ALIBI)
    if config.attn_config.clip_qkv is not None:
        writer.add_clamp_kqv(config.attn_config.clip_qkv)


def _add_norms(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    config = layout.config
    if layout.architecture in MEAN_SQUARES:
        writer.add_layer_norm_rms_eps(getattr(config, MEAN_SQUARES[layout.architecture]))
    elif hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        own = (getattr(config, name) for name in LAYER_NORMS if hasattr(config, name))
        writer.add_layer_norm_eps(next(own, OLMO_NORM))


def _add_window(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    config: transformers.PretrainedConfig = layout.config
    context: int = getattr(config, CONTEXTS.get(config.model_type, "max_position_embeddings"), None) or BLOOM_CONTEXT
    window: int = getattr(config, "sliding_window", None) or 0
    if layout.architecture in WINDOWS and hasattr(config, "layer_types"):
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if "sliding_attention" in config.rope_parameters:
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    elif window and layout.architecture in PERIODS:
        writer.add_sliding_window(window)
    elif window and "sliding_attention" in (getattr(config, "layer_types", None) or SLIDING):
        context = min(context, window)  # llama.cpp has no window in this architecture: it agrees so far
    writer.add_context_length(context)
