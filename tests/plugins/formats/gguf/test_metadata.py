"""What a GGUF file says of a model is what its configuration says."""

from pathlib import Path
from typing import Any

import pytest

from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.layers import STATES_ALONE, head_size, heads_of_keys, inner_size, key_size, value_size
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import FAMILIES, config_of, said

# A part of each head, or nothing.
TURNED = {"stablelm": 4, "nemotron": 2, "phi": 2, "glm": 2, "glm4": 2, "glm4_moe": 2, "gpt_neox": 4}
TURNED |= {"qwen3_next": 4, "qwen3_5": 2, "qwen3_5_moe": 2, "bamba": 2, "mimo_v2_flash": 2}
REACH = {"mistral": 64, "cwm": 128, "ministral": 128}
STILL = ("gpt2", "gpt_bigcode", "bloom", "mpt", "nemotron_h", "jamba")
NORMS = {
    "cohere": ("", "layer_norm_eps"),
    "cohere2": ("", "layer_norm_eps"),
    "phi": ("", "layer_norm_eps"),
    "lfm2": ("rms_", "norm_eps"),
    "starcoder2": ("", "norm_epsilon"),
    "stablelm": ("", "layer_norm_eps"),
    "nemotron": ("", "norm_eps"),
    "lfm2_moe": ("rms_", "norm_eps"),
    "jais2": ("", "layer_norm_eps"),
    "gpt_neox": ("", "layer_norm_eps"),
    "nemotron_h": ("rms_", "layer_norm_epsilon"),
    **dict.fromkeys(STATES_ALONE, ("rms_", "layer_norm_epsilon")),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "bloom", "falcon", "falcon-grouped", "mpt"), ("", "layer_norm_epsilon")),
}
MIXTURES = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "granitemoe", "granitemoeshared", "dots1"),
    *("ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2", "exaone_moe", "afmoe", "solar_open", "lfm2_moe", "jamba"),
    *("qwen3_next", "qwen3_5_moe", "granite4", "granite4-turned", "granite4-attending"),
    *("gemma4-mixture", "deepseek_v2", "kimi_linear", "glm4_moe_lite", "mimo_v2_flash"),
}


@pytest.mark.parametrize("changes", [{}, {"seq_length": None}])
def test_a_bloom_that_names_no_context_has_that_of_its_family(changes: dict[str, Any], tmp_path: Path) -> None:
    config: Any = config_of("bloom", **(FAMILIES["bloom"][1] | changes))
    if not changes:
        del config.seq_length
    assert said(tmp_path, config)["context_length"] == 2048


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_says_what_the_configuration_says(family: str, tmp_path: Path) -> None:
    name, changes = FAMILIES[family]
    config = config_of(name, **changes)
    check_config(layout_of(config))
    entries = said(tmp_path, config)
    size = head_size(config)
    expected = {
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": inner_size(config),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": heads_of_keys(config),
        "attention.key_length": key_size(config),
        "attention.value_length": value_size(config),
        "rope.dimension_count": None if name in STILL else size // TURNED.get(name, 1),
        "context_length": REACH.get(name, 256),  # as far as a window of attention reaches
    }
    if name == "kimi_linear":
        expected |= {"rope.dimension_count": config.qk_rope_head_dim}
    if name in STATES_ALONE:
        expected |= {"feed_forward_length": 0, "attention.head_count": 0, "rope.dimension_count": None}
        expected |= dict.fromkeys(("attention.head_count_kv", "attention.key_length", "attention.value_length"))
    assert {key: entries.get(key) for key in expected} == expected
    norm, epsilon = NORMS.get(name, ("rms_", "rms_norm_eps"))
    if name != "olmo" and family != "falcon_h1":
        assert entries[f"attention.layer_norm_{norm}epsilon"] == pytest.approx(getattr(config, epsilon))
    chosen = {name, family} & MIXTURES or family == "nemotron_h"
    experts = {"expert_count": 4, "expert_used_count": 2} if chosen else {}
    if name == "deepseek_v3":
        experts = {"expert_count": 8, "expert_used_count": 2}
    if name == "llama4":
        experts = {"expert_count": 4, "expert_used_count": 1}
    assert {key: value for key, value in entries.items() if key in ("expert_count", "expert_used_count")} == experts


def test_the_factors_of_granite_are_told(tmp_path: Path) -> None:
    entries = said(tmp_path, config_of("granite"))
    names = ("embedding_scale", "residual_scale", "logit_scale", "attention.scale")
    assert [entries[name] for name in names] == pytest.approx([1.5, 0.5, 2.0, 0.2])


def test_the_bounds_of_mpt_and_olmo_are_told(tmp_path: Path) -> None:
    mpt = said(tmp_path / "mpt", config_of("mpt", attn_config={"clip_qkv": 0.5, "alibi_bias_max": 4}))
    assert (mpt["attention.clamp_kqv"], mpt["attention.max_alibi_bias"]) == (0.5, 8.0)
    assert said(tmp_path / "olmo", config_of("olmo"))["attention.clamp_kqv"] == 0.5


def test_experts_that_all_tokens_have_are_told_with_their_width(tmp_path: Path) -> None:
    entries = said(tmp_path, config_of("ernie4_5_moe"))
    assert (entries["expert_shared_count"], entries["expert_shared_feed_forward_length"]) == (2, 128)


def test_experts_of_as_many_widths_as_layers_are_told_where_all_are_the_same(tmp_path: Path) -> None:
    counts = {"moe_intermediate_size": [96, 96], "moe_topk": [2, 2]}  # as published files of Hunyuan have them
    entries = said(tmp_path, config_of("hunyuan_v1_moe", **counts))
    assert (entries["expert_feed_forward_length"], entries["expert_used_count"]) == (96, 2)


@pytest.mark.parametrize(("kinds", "count"), [(["sparse"] * 4, 0), (["dense", "dense", "sparse", "sparse"], 2)])
def test_the_list_of_layers_says_how_many_have_no_experts(kinds: list[str], count: int, tmp_path: Path) -> None:
    config = config_of("exaone_moe", num_hidden_layers=4, mlp_layer_types=kinds, first_k_dense_replace=1)
    assert said(tmp_path, config)["leading_dense_block_count"] == count
