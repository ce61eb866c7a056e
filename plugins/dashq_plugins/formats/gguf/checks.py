"""Configurations of which llama.cpp would compute something else than they say, refused before a weight is read."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout
from dashq_plugins.formats.gguf.experts import expert_count, leading_layers, shared_expert_count
from dashq_plugins.formats.gguf.falcon_h1 import check_falcon_h1
from dashq_plugins.formats.gguf.gemma3n import check_gemma3n
from dashq_plugins.formats.gguf.gemma4 import check_gemma4
from dashq_plugins.formats.gguf.kimi_linear import check_kimi_linear
from dashq_plugins.formats.gguf.latent import LATENT, check_latent
from dashq_plugins.formats.gguf.layers import head_size
from dashq_plugins.formats.gguf.llama4 import check_llama4
from dashq_plugins.formats.gguf.mimo2 import check_mimo2
from dashq_plugins.formats.gguf.names import FAMILIES
from dashq_plugins.formats.gguf.rotary import check_rope
from dashq_plugins.formats.gguf.states import STATES, check_states
from dashq_plugins.formats.gguf.windows import check_windows

ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation", "mlp_hidden_act")
# Those that llama.cpp does not load without experts that all tokens have.
SHARING = {"dots1", "afmoe", "exaone-moe", "glm4moe", "nemotron_h_moe", "deepseek2"}
ANYWHERE = {"mimo2"}  # that may have layers without experts between others
EQUAL_HEADS = {"olmoe", "dots1"}
NO_ROPE_STEP = 4  # every fourth layer of SmolLM3 turns nothing
# Settings that give biases to architectures for which llama.cpp has no place there.
BIASES = {
    "attention_bias": {
        *("command-r", "cohere2", "olmo", "olmo2", "olmoe", "dots1", "hunyuan-dense", "hunyuan-moe", "afmoe", "arcee"),
        *("qwen3", "qwen3moe", "qwen3vl", "qwen3next", "qwen35", "qwen35moe"),
        *("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "smollm3"),
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
    *("stablelm", "nemotron", "phi2", "dots1", "minimax-m2", "mimo2", "apertus", "kimi-linear"),
}
NO_LIMIT = {"time_step_limit": (0.0, math.inf)}
MAMBA = {"mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_expand": 2}
ALONE = {"use_conv_bias": True, "use_bias": False, "expand": 2}  # where nothing but states is
FALCON_H1 = {"mamba_conv_bias": True, "attention_bias": False, "mlp_bias": False}
NEMOTRON_H = {"use_conv_bias": True, "use_bias": False, "mlp_bias": False, "mamba_hidden_act": "silu"}
# Settings of which llama.cpp takes one value for granted.
GRANTED: Mapping[str, Mapping[str, Any]] = {
    "llama4": {
        "attention_chunk_size": 8192,
        "attn_temperature_tuning": True,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    },
    "olmoe": {"clip_qkv": None},
    "gemma3n": {
        "altup_active_idx": 0,
        "altup_num_inputs": 4,
        "altup_correct_scale": True,
        "laurel_rank": 64,
        "hidden_size_per_layer_input": 256,
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
    "mimo2": {"routed_scaling_factor": 1.0},
    "jamba": MAMBA,
    "granitehybrid": MAMBA | NO_LIMIT,
    "mamba": ALONE,
    "mamba2": ALONE | NO_LIMIT,
    "falcon-h1": FALCON_H1 | NO_LIMIT | {"mamba_proj_bias": False, "projectors_bias": False},
    "nemotron_h": NEMOTRON_H,
    "nemotron_h_moe": NEMOTRON_H,
    "mpt": {"alibi": True, "softmax_scale": None, "qk_ln": False},
}
# What is checked of one architecture alone.
CHECKS: Mapping[str, Callable[[GgufLayout], None]] = {
    "falcon-h1": check_falcon_h1,
    "gemma3n": check_gemma3n,
    "gemma4": check_gemma4,
    "llama4": check_llama4,
    "mimo2": check_mimo2,
    **dict.fromkeys(LATENT, check_latent),
    "kimi-linear": check_kimi_linear,
    **dict.fromkeys(STATES, check_states),
}
ATTENTION = "attn_config"  # the part of MPT's configuration that says how it attends


def check_config(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than the configuration says."""
    config, family = layout.config, FAMILIES[layout.config.model_type]
    check_rope(layout)
    activation = next((own for name in ACTIVATIONS if (own := getattr(config, name, None))), family.activation)
    if activation != family.activation:
        raise PlanError(f"llama.cpp computes {family.activation} in {family.architecture}, and this model {activation}")
    _check_experts(layout)
    # llama.cpp recognizes Gemma 2 and 3 27B by their layers, and divides their queries by the root of another width.
    if scalar := getattr(config, "query_pre_attn_scalar", None):
        largest = (layout.architecture, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62))
        width = config.hidden_size // config.num_attention_heads if largest else head_size(config)
        if scalar != width:
            raise PlanError(f"llama.cpp divides queries by the root of {width}, and this model by that of {scalar}")
    check_windows(layout)
    _check_own(layout)


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
        check(layout)
    if config.tie_word_embeddings and layout.architecture in UNTIED:
        raise PlanError(
            f"llama.cpp wants a head of its own in {layout.architecture}, and this model's embeddings serve as head"
        )
    for name, value in GRANTED.get(layout.architecture, {}).items():
        own = getattr(getattr(config, ATTENTION, config), name, value)
        if (tuple(own) if isinstance(own, list) else own) != value:
            raise PlanError(f"llama.cpp computes {layout.architecture} with {name} = {value}, and here it is {own}")


def _check_experts(layout: GgufLayout) -> None:
    """Refuse mixtures whose experts are chosen otherwise, or lie in other layers."""
    config = layout.config
    if layout.architecture not in LATENT:
        _check_router(layout)
    for name in ("num_experts", "num_experts_per_tok"):
        if isinstance(counts := getattr(config, name, None), list) and len({*counts}) > 1:
            raise PlanError(f"llama.cpp wants the same {name} in all layers, and this model has {counts}")
    if layout.architecture in SHARING and expert_count(layout) and not shared_expert_count(config):
        raise PlanError(
            f"llama.cpp wants experts that all tokens have in {layout.architecture}, and this model has none"
        )
    kinds: list[str] = getattr(config, "mlp_layer_types", None) or []
    last = config.num_hidden_layers - 1
    ends = getattr(config, "moe_layer_end_index", last) not in (-1, last)
    if layout.architecture not in ANYWHERE and (ends or "dense" in kinds[leading_layers(config) :]):
        raise PlanError(f"llama.cpp has experts in all layers behind the first of {layout.architecture} that has them")


def _check_router(layout: GgufLayout) -> None:
    """Refuse experts of one group alone, and weights that add up to another sum than in llama.cpp."""
    config = layout.config
    if getattr(config, "norm_topk_prob", normalizes := FAMILIES[config.model_type].normalizes) != normalizes:
        does, other = ("lets", "does not") if normalizes else ("does not let", "does")
        raise PlanError(f"llama.cpp {does} the weights of a token's experts add up to 1, and this model {other}")
    if (groups := getattr(config, "n_group", 1)) != 1:
        raise PlanError(
            f"llama.cpp chooses among all experts in {layout.architecture}, and this model in {groups} groups"
        )
