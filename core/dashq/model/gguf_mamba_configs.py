"""Configurations of GGUF files of models in which all layers have states and none attends."""

from collections.abc import Mapping
from typing import Any

from transformers import FalconMambaConfig, Mamba2Config, MambaConfig, PretrainedConfig

MAMBA = ("mamba", "mamba2")  # architectures
NAMES = {
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
    "ssm.group_count": "n_groups",
}
COMMON = ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")


def mamba_config(architecture: str, own: Mapping[str, Any], values: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a file with these entries; `values` are the settings that all families have.

    A file of Mamba whose steps, keys and queries are normed is one of Falcon Mamba.
    """
    settings: dict[str, Any] = {key: value for key, value in values.items() if key in COMMON or key.endswith("token_id")}
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
