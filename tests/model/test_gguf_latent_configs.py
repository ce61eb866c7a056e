"""Configurations of files with latent attention say what the model's own says, or nothing is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig

from dashq import run
from dashq.model.gguf_latent_configs import build_latent
from dashq.model.loading import read_config
from dashq.model.location import Location
from gguf_results import FAMILIES, PHI, SIZES, config_of, recipe, said
from pico import pico_model

# What a file has no word for.
UNSAID = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "initializer_range", "pad_token_id"),
    *("embedding_initializer_range", "num_nextn_predict_layers", "topk_method", "n_group", "topk_group"),
    *("rms_norm_eps", "rope_parameters", "num_experts"),
}
FACTORED = {"rope_parameters": PHI | {"original_max_position_embeddings": 256}}


@pytest.mark.parametrize(
    ("label", "changes"),
    [
        ("deepseek_v2", {}),
        ("deepseek_v2-lite", {"tie_word_embeddings": True}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}),
        ("youtu", {}),
        ("minicpm3", {}),
        ("minicpm3", FACTORED),
    ],
)
def test_the_configuration_is_that_of_the_model(label: str, changes: dict[str, Any], tmp_path: Path) -> None:
    base, own = FAMILIES[label]
    model = pico_model(base, tmp_path / "model", torch.float16, **SIZES | own | changes)
    file = Location(run(recipe(model, tmp_path / "out")), "model.gguf")
    config, expected = read_config(file), read_config(Location(model))
    entries = config.to_dict()
    assert {name: entries[name] for name in expected.to_dict() if name not in UNSAID} == {
        name: value for name, value in expected.to_dict().items() if name not in UNSAID
    }
    assert config.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    for name, value in expected.rope_parameters.items():
        assert config.rope_parameters[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    if label == "deepseek_v3":
        assert (config.n_group, config.topk_group) == (expected.n_group, expected.topk_group)


def test_a_file_of_glm_is_read_as_deepseek_v3_which_computes_the_same(tmp_path: Path) -> None:
    config = built(tmp_path, "glm4_moe_lite")
    assert (config.model_type, config.n_group, config.first_k_dense_replace) == ("deepseek_v3", 1, 1)
    assert config.routed_scaling_factor == pytest.approx(1.8)


@pytest.mark.parametrize(
    ("label", "changes", "words"),
    [
        ("deepseek_v3", {"attention.key_length_mla": None}, "it has keys and values in one matrix"),
        ("deepseek_v2", {"expert_weights_norm": True}, "it chooses among experts otherwise than DeepSeek V2 or V3"),
        ("deepseek_v2", {"expert_group_count": 2}, "it chooses among experts otherwise than DeepSeek V2 or V3"),
        ("deepseek_v3", {"expert_gating_func": 3}, "it chooses among experts otherwise than DeepSeek V2 or V3"),
        ("deepseek_v3", {"rope.scaling.type": "linear"}, "it scales rotary embeddings by 'linear'"),
        ("deepseek_v3", {"rope.scaling.yarn_beta_fast": 1.0}, "it computes YaRN with beta_fast = 1.0"),
        ("deepseek_v3", {"rope.scaling.yarn_log_multiplier": None}, "it scales rotary embeddings by 'yarn'"),
    ],
)
def test_what_transformers_computes_otherwise_is_refused(
    label: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        built(tmp_path, label, changes)


def test_a_file_that_does_not_say_how_experts_score_is_of_deepseek_v2(tmp_path: Path) -> None:
    assert built(tmp_path, "deepseek_v2", {"expert_gating_func": None}).model_type == "deepseek_v2"


def built(folder: Path, label: str, changes: dict[str, Any] | None = None) -> PretrainedConfig:
    """What is built of a file's entries, with some others in their place; None for those that it lacks."""
    name, own = FAMILIES[label]
    config = config_of(name, **own)
    entries = {key: value for key, value in (said(folder, config) | (changes or {})).items() if value is not None}
    values = {
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }
    return build_latent("deepseek2", entries, values, {})
