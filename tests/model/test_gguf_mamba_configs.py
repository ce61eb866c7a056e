"""Configurations of models that only have states say what the file says, and a norm of steps makes another family."""

from typing import Any

import pytest

from dashq.model.gguf_mamba_configs import mamba_config

ENTRIES: dict[str, Any] = {
    "embedding_length": 64,
    "attention.layer_norm_rms_epsilon": 1e-4,
    "ssm.conv_kernel": 3,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
    "ssm.inner_size": 128,
}
VALUES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 0, "tie_word_embeddings": True}


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
