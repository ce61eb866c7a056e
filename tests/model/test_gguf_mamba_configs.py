"""Configurations of models that only have states say what the file says, and a norm of steps makes another family."""

from typing import Any

import pytest

from dashq.model.gguf_mamba_configs import falcon_h1_config, mamba_config

ENTRIES: dict[str, Any] = {
    "embedding_length": 64,
    "attention.layer_norm_rms_epsilon": 1e-4,
    "ssm.conv_kernel": 3,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
    "ssm.inner_size": 128,
}
VALUES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 0,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("entries", "kind"),
    [({}, "mamba"), ({"ssm.dt_b_c_rms": False}, "mamba"), ({"ssm.dt_b_c_rms": True}, "falcon_mamba")],
)
def test_norms_of_steps_tell_falcon_mamba_from_mamba(entries: dict[str, bool], kind: str) -> None:
    config = mamba_config("mamba", ENTRIES | entries, VALUES)
    assert (config.model_type, config.num_hidden_layers, config.tie_word_embeddings) == (kind, 3, True)
    assert (config.state_size, config.conv_kernel, config.time_step_rank, config.expand) == (16, 3, 8, 2)
    assert config.layer_norm_epsilon == getattr(config, "mixer_rms_eps", 1e-4) == 1e-4


def test_states_of_mamba_2_have_heads_and_groups() -> None:
    config = mamba_config("mamba2", ENTRIES | {"ssm.group_count": 2}, VALUES)
    assert (config.model_type, config.num_heads, config.head_dim, config.n_groups) == ("mamba2", 8, 16, 2)


@pytest.mark.parametrize("tensors", [(), ("blk.0.ssm_norm.weight",)])
def test_a_norm_among_the_tensors_says_that_states_of_falcon_h1_are_normed(tensors: tuple[str, ...]) -> None:
    values = VALUES | {"num_attention_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-5}
    config = falcon_h1_config(ENTRIES | {"ssm.group_count": 2, "rope.freq_base": 1e11}, values, tensors)
    assert (config.mamba_rms_norm, config.mamba_norm_before_gate) == (bool(tensors), False)
    assert (config.mamba_d_ssm, config.mamba_n_heads, config.mamba_d_head, config.head_dim) == (128, 8, 16, 16)
    assert config.rope_parameters["rope_theta"] == 1e11
