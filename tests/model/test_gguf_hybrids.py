"""Configurations of hybrids say which layers have states, and which attend, as the file's heads and widths tell."""

from typing import Any

import pytest

from dashq.model.gguf_hybrids import hybrid_config

ENTRIES: dict[str, Any] = {
    "embedding_length": 64,
    "attention.key_length": 16,
    "rope.dimension_count": 16,
    "feed_forward_length": 96,
    "attention.head_count_kv": [0, 2, 0],
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 8,
    "ssm.inner_size": 128,
}
VALUES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "rms_norm_eps": 1e-5}


@pytest.mark.parametrize(("entries", "kind"), [({}, "rope"), ({"rope.scaling.finetuned": False}, None)])
def test_layers_of_granite_with_heads_of_keys_attend(entries: dict[str, bool], kind: str | None) -> None:
    config = hybrid_config("granitehybrid", ENTRIES | entries, VALUES)
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    assert (config.num_key_value_heads, config.mamba_d_head, config.mamba_expand) == (2, 16, 2)
    assert (config.num_local_experts, config.shared_intermediate_size) == (0, 96)
    assert config.position_embedding_type == kind


@pytest.mark.parametrize(("entries", "kind"), [({}, "bamba"), ({"residual_scale": 0.5}, "granitemoehybrid")])
def test_a_file_that_turns_half_of_each_head_and_has_no_factors_is_one_of_bamba(
    entries: dict[str, float], kind: str
) -> None:
    config = hybrid_config("granitehybrid", ENTRIES | {"rope.dimension_count": 8} | entries, VALUES)
    assert config.model_type == kind
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]


@pytest.mark.parametrize(("architecture", "network"), [("nemotron_h", "mlp"), ("nemotron_h_moe", "moe")])
def test_layers_of_nemotron_without_heads_or_width_have_states(architecture: str, network: str) -> None:
    config = hybrid_config(architecture, ENTRIES | {"feed_forward_length": [0, 0, 96]}, VALUES)
    assert config.layer_types == ["linear_attention", "full_attention", network]
    assert (config.intermediate_size, config.mamba_num_heads, config.mamba_head_dim) == (96, 8, 16)
