"""Configurations of GGUF files of models with latent attention, which transformers makes none of."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, MiniCPM3Config, PretrainedConfig, YoutuConfig

LATENT = ("deepseek2", "minicpm3")  # architectures
EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_shared_count": "n_shared_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
}
SOFTMAX, SIGMOID = 1, 2  # how experts score
# A file that says nothing of it: GLM 4.7 Flash, by its layers and its vocabulary, and DeepSeek V2.
GLM_LAYERS, GLM_VOCABULARY = (47, 48), 154880
TENTH = 0.1  # of `mscale_all_dim` is what a file holds
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # where a file names them
FACTORS = ("rope_factors_long.weight", "rope_factors_short.weight")


def build_latent(
    architecture: str,
    own: Mapping[str, Any],
    values: Mapping[str, Any],
    factors: Mapping[str, Float[Tensor, " frequencies"]],
) -> PretrainedConfig:
    """The configuration of a file whose entries are `own`; `values` are the settings of all families.

    `factors` are the tables in `FACTORS`, where the file has them. Raises a `ValueError` for what transformers would
    compute otherwise.
    """
    values = {name: value for name, value in values.items() if name != "head_dim"}
    values |= {
        "num_key_value_heads": values["num_attention_heads"],
        "q_lora_rank": own.get("attention.q_lora_rank") or None,
        "kv_lora_rank": own["attention.kv_lora_rank"],
        "qk_rope_head_dim": own["rope.dimension_count"],
    }
    if architecture == "minicpm3":
        return _minicpm3(own, values, factors)
    if "attention.key_length_mla" not in own:
        raise ValueError(
            "it has keys and values in one matrix, as llama.cpp wrote them once: use the model's safetensors"
        )
    values |= {
        "qk_nope_head_dim": own["attention.key_length_mla"] - values["qk_rope_head_dim"],
        "v_head_dim": own["attention.value_length_mla"],
        "rope_parameters": _rope(own),
    }
    if not own.get("expert_count"):
        return YoutuConfig(**values, architectures=["YoutuForCausalLM"])
    glm = values["num_hidden_layers"] in GLM_LAYERS and values["vocab_size"] == GLM_VOCABULARY
    scoring = own.get("expert_gating_func", SIGMOID if glm else SOFTMAX)
    values |= {name: own[key] for key, name in EXPERTS.items()}
    values |= {
        "routed_scaling_factor": own.get("expert_weights_scale") or 1.0,
        "first_k_dense_replace": own.get("leading_dense_block_count", 0),
    }
    norms, groups = own.get("expert_weights_norm", False), own.get("expert_group_count") or 1
    if scoring == SIGMOID:
        values |= {"n_group": groups, "topk_group": own.get("expert_group_used_count", groups), "norm_topk_prob": norms}
        return DeepseekV3Config(**values, architectures=["DeepseekV3ForCausalLM"])
    if scoring != SOFTMAX or norms or groups > 1:
        raise ValueError(
            "it chooses among experts otherwise than DeepSeek V2 or V3 do in transformers: use the model's safetensors"
        )
    return DeepseekV2Config(**values, architectures=["DeepseekV2ForCausalLM"])


def _minicpm3(
    own: Mapping[str, Any], values: Mapping[str, Any], factors: Mapping[str, Float[Tensor, " frequencies"]]
) -> PretrainedConfig:
    """The configuration of a MiniCPM 3, whose factors for long and for short texts are tensors of the file."""
    rope = {"rope_type": "default", "rope_theta": _base(own)}
    if factors:
        long, short = (factors[name].tolist() for name in FACTORS)
        original = own.get("rope.scaling.original_context_length", own["context_length"])
        rope |= {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "original_max_position_embeddings": original,
            "attention_factor": own.get("rope.scaling.attn_factor", 1.0),
        }
    values = {
        **values,
        "qk_nope_head_dim": own["attention.key_length"] - values["qk_rope_head_dim"],
        "v_head_dim": own.get("attention.value_length"),
        "rope_parameters": rope,
    }
    return MiniCPM3Config(**values, architectures=["MiniCPM3ForCausalLM"])


def _rope(own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rotary embeddings as they are, or YaRN that scales all of attention."""
    base, kind = _base(own), own.get("rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": base}
    if kind != "yarn" or not own.get("rope.scaling.yarn_log_multiplier"):
        raise ValueError(f"it scales rotary embeddings by {kind!r}, which cannot be read from GGUF files")
    for name, value in YARN.items():
        if (bound := own.get(f"rope.scaling.yarn_{name}", value)) != value:
            raise ValueError(f"it computes YaRN with {name} = {bound}, which cannot be read from GGUF files")
    scale = round(own["rope.scaling.yarn_log_multiplier"] / TENTH, 6)
    return {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": own["rope.scaling.factor"],
        "original_max_position_embeddings": own["rope.scaling.original_context_length"],
        "mscale": scale,
        "mscale_all_dim": scale,
    }


def _base(own: Mapping[str, Any]) -> float:
    return float(own.get("rope.freq_base", 10000.0))
