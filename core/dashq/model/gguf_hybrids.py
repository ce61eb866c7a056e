"""Configurations of GGUF files of hybrids, in which some layers have states and others attend."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BambaConfig, GraniteMoeHybridConfig, NemotronHConfig, PretrainedConfig

HYBRIDS = ("granitehybrid", "nemotron_h", "nemotron_h_moe")
FACTORS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attention.scale": "attention_multiplier",
}
GRANITE = FACTORS | {
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
}
NEMOTRON = {
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
    "expert_weights_scale": "routed_scaling_factor",
    "moe_latent_size": "moe_latent_size",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "ssm_state_size",
    "ssm.group_count": "n_groups",
    "ssm.time_step_rank": "mamba_num_heads",
}


def hybrid_config(architecture: str, own: Mapping[str, Any], values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a file with these entries; `values` are the settings that all families have."""
    heads: Sequence[int] = own["attention.head_count_kv"]
    settings: dict[str, Any] = {**values, "num_key_value_heads": max(heads)}
    size = own["ssm.inner_size"] // own["ssm.time_step_rank"]
    if architecture == "granitehybrid":
        settings |= {name: own[key] for key, name in GRANITE.items() if key in own}
        settings |= {"mamba_d_head": size, "mamba_expand": own["ssm.inner_size"] // own["embedding_length"]}
        if not own.keys() & FACTORS.keys() and 2 * own["rope.dimension_count"] == own["attention.key_length"]:
            return BambaConfig(  # which turns a half of each head
                **settings,
                attn_layer_indices=[index for index, count in enumerate(heads) if count],
                rope_parameters={"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)},
                architectures=["BambaForCausalLM"],
            )
        inner = own["feed_forward_length"]
        settings.setdefault("num_local_experts", 0)
        return GraniteMoeHybridConfig(
            **settings,
            shared_intermediate_size=own.get("expert_shared_feed_forward_length", inner),
            layer_types=["full_attention" if count else "linear_attention" for count in heads],
            position_embedding_type="rope" if own.get("rope.scaling.finetuned", True) else None,
            rope_parameters={"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)},
            architectures=["GraniteMoeHybridForCausalLM"],
        )
    widths: Sequence[int] = own["feed_forward_length"]
    network = "moe" if architecture == "nemotron_h_moe" else "mlp"
    kinds = [
        "full_attention" if count else network if width else "linear_attention"
        for count, width in zip(heads, widths, strict=True)
    ]
    settings = {name: value for name, value in settings.items() if hasattr(NemotronHConfig, name)}
    settings |= {name: own[key] for key, name in NEMOTRON.items() if key in own}
    settings["intermediate_size"] = max(widths)
    return NemotronHConfig(
        **settings,
        mamba_head_dim=size,
        layers_block_type=kinds,
        architectures=["NemotronHForCausalLM"],
    )
