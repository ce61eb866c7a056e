"""Configurations of GGUF files that transformers makes none of: mixtures of Mistral's, gpt-oss, Gemma 4 and others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    Gemma4TextConfig,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from dashq.model.gguf_hybrids import HYBRIDS, hybrid_config
from dashq.model.gguf_latent_configs import FACTORS, LATENT, build_latent
from dashq.model.gguf_mamba_configs import FALCON_H1, MAMBA, falcon_h1_config, mamba_config
from dashq.model.transformers_internals import read_gguf_settings, read_gguf_table, read_gguf_vectors

NAMES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
}
EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
FREQUENCIES = "rope_freqs.weight"
# Those with linear attention, by their architectures.
LINEAR: Mapping[str, tuple[type[PretrainedConfig], str]] = {
    "qwen3next": (Qwen3NextConfig, "Qwen3NextForCausalLM"),
    "qwen35": (Qwen3_5TextConfig, "Qwen3_5ForCausalLM"),
    "qwen35moe": (Qwen3_5MoeTextConfig, "Qwen3_5MoeForCausalLM"),
}
STATES = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
INTERVAL = 4  # of layers with full attention, where a file says nothing
SOFTCAP = 30.0  # of Gemma 4's logits, where a file says nothing


def build_config(path: Path) -> PretrainedConfig | None:
    """The configuration of the GGUF file at `path`; None where transformers makes it."""
    settings = read_gguf_settings(str(path))
    architecture, table, _ = read_gguf_table(str(path))
    own = {key.removeprefix(f"{architecture}."): value for key, value in settings.items()}
    others = architecture == "llama" and own.get("expert_count")
    if architecture not in ("gpt-oss", "gemma4", *LATENT, *LINEAR, *HYBRIDS, *MAMBA, FALCON_H1) and not others:
        return None
    tensors = {name for name, *_ in table}
    values = {name: own[key] for key, name in NAMES.items() if key in own}
    values |= {f"{word}_token_id": settings.get(f"tokenizer.ggml.{name}_token_id") for word, name in TOKENS.items()}
    values |= {"vocab_size": settings["tokenizer.ggml.tokens"], "tie_word_embeddings": "output.weight" not in tensors}
    if architecture in LATENT:
        return build_latent(architecture, own, values, read_gguf_vectors(str(path), FACTORS))
    if architecture == "gemma4":
        (frequencies,) = read_gguf_vectors(str(path), (FREQUENCIES,)).values() or (None,)
        share = 1.0 if frequencies is None else float((frequencies == 1).float().mean())
        values |= {**_gemma4(own, values, tensors), "rope_parameters": _gemma4_rope(own, share)}
        return Gemma4TextConfig(**values, architectures=["Gemma4ForCausalLM"])
    if architecture == FALCON_H1:
        return falcon_h1_config(own, values, tensors)
    if architecture in MAMBA:
        return mamba_config(architecture, own, values)
    if architecture in HYBRIDS:
        return hybrid_config(architecture, own, values)
    if architecture in LINEAR:
        kind, name = LINEAR[architecture]
        known = {key: value for key, value in values.items() if hasattr(kind, key)}
        return kind(**{**known, **_linear(own)}, architectures=[name])
    values |= {name: own[key] for key, name in EXPERTS.items()}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)}
    if architecture == "gpt-oss":
        return GptOssConfig(**values, architectures=["GptOssForCausalLM"])
    return MixtralConfig(**values, architectures=["MixtralForCausalLM"])


def _gemma4(own: Mapping[str, Any], values: Mapping[str, Any], tensors: set[str]) -> Mapping[str, Any]:
    """The settings of Gemma 4, whose sizes may differ from layer to layer; `values` are those of all families."""
    slides: list[bool] = own["attention.sliding_window_pattern"]
    near, far = slides.index(True), slides.index(False)  # the first layers with a window and without
    heads, inner = values["num_key_value_heads"], values["intermediate_size"]
    first = _of(inner, 0)
    return {
        "head_dim": own["attention.key_length_swa"],
        "global_head_dim": own["attention.key_length"],
        "num_key_value_heads": _of(heads, near),
        "num_global_key_value_heads": _of(heads, far),
        "attention_k_eq_v": f"blk.{far}.attn_v.weight" not in tensors,
        "num_kv_shared_layers": own.get("attention.shared_kv_layers", 0),
        "intermediate_size": first,
        "use_double_wide_mlp": _of(inner, -1) > first,
        "hidden_size_per_layer_input": own.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": values["vocab_size"],
        "final_logit_softcapping": own.get("final_logit_softcapping", SOFTCAP) or None,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in slides],
        "enable_moe_block": "expert_count" in own,
        "num_experts": own.get("expert_count"),
        "top_k_experts": own.get("expert_used_count"),
        "moe_intermediate_size": own.get("expert_feed_forward_length"),
    }


def _gemma4_rope(own: Mapping[str, Any], share: float) -> Mapping[str, Any]:
    """The rotary embeddings of Gemma 4, of which a `share` turns in layers without a window."""
    return {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": share,
            "rope_theta": own["rope.freq_base"],
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": own["rope.freq_base_swa"]},
    }


def _linear(own: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of models whose layers have linear attention, but each whose number an interval divides."""
    interval = own.get("full_attention_interval", INTERVAL)
    layers = own["block_count"] - own.get("nextn_predict_layers", 0)  # those behind predict further tokens
    rope = {
        "rope_type": "default",
        "rope_theta": own["rope.freq_base"],
        "partial_rotary_factor": own["rope.dimension_count"] / own["attention.key_length"],
    }
    if sections := own.get("rope.dimension_sections"):
        rope["mrope_section"] = sections[:3]
    return {
        **{name: own[key] for key, name in STATES.items() if key in own},
        "linear_value_head_dim": own["ssm.inner_size"] // own["ssm.time_step_rank"],
        "num_hidden_layers": layers,
        "layer_types": [
            "linear_attention" if number % interval else "full_attention" for number in range(1, layers + 1)
        ],
        "rope_parameters": rope,
    }


def _of(sizes: Any, layer: int) -> Any:
    """The size in one layer, where all layers have the same or each its own."""
    return sizes[layer] if isinstance(sizes, list) else sizes
