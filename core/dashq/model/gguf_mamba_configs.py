"""Configurations of GGUF files of models in which all layers have states: those of Mamba, and of Falcon-H1."""

from collections.abc import Collection, Mapping
from typing import Any

from transformers import FalconH1Config, FalconMambaConfig, Mamba2Config, MambaConfig, PretrainedConfig

MAMBA = ("mamba", "mamba2")  # architectures
FALCON_H1 = "falcon-h1"  # another
NAMES = {
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.group_count": "n_groups",
}
OF_FALCON_H1 = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.group_count": "mamba_n_groups",
    "ssm.time_step_rank": "mamba_n_heads",
    "ssm.inner_size": "mamba_d_ssm",
}
COMMON = ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")


def mamba_config(architecture: str, own: Mapping[str, Any], values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a file with these entries; `values` are the settings that all families have.

    A file of Mamba whose steps, keys and queries are normed is one of Falcon Mamba.
    """
    settings: dict[str, Any] = {
        key: value for key, value in values.items() if key in COMMON or key.endswith("token_id")
    }
    settings |= {name: own[key] for key, name in NAMES.items() if key in own}
    inner, rank = own["ssm.inner_size"], own["ssm.time_step_rank"]
    settings["expand"] = inner // own["embedding_length"]
    if architecture == "mamba2":
        settings |= {"num_heads": rank, "head_dim": inner // rank}
        return Mamba2Config(**settings, architectures=["Mamba2ForCausalLM"])
    settings |= {"time_step_rank": rank}
    if own.get("ssm.dt_b_c_rms", False):
        settings |= {"mixer_rms_eps": settings["layer_norm_epsilon"]}  # llama.cpp adds the same in all norms
        return FalconMambaConfig(**settings, architectures=["FalconMambaForCausalLM"])
    return MambaConfig(**settings, architectures=["MambaForCausalLM"])


def falcon_h1_config(own: Mapping[str, Any], values: Mapping[str, Any], tensors: Collection[str]) -> PretrainedConfig:
    """The configuration of a Falcon-H1 whose factors its file holds in the weights, as llama.cpp writes them."""
    return FalconH1Config(
        **values,
        **{name: own[key] for key, name in OF_FALCON_H1.items()},
        mamba_d_head=own["ssm.inner_size"] // own["ssm.time_step_rank"],
        mamba_rms_norm="blk.0.ssm_norm.weight" in tensors,
        mamba_norm_before_gate=False,
        rope_parameters={"rope_type": "default", "rope_theta": own.get("rope.freq_base", 10000.0)},
        architectures=["FalconH1ForCausalLM"],
    )
