"""What a GGUF file says of a model is what its configuration says, and what llama.cpp computes otherwise is refused."""

from pathlib import Path
from typing import Any

import pytest

from dashq import PlanError
from dashq_plugins.formats.gguf.layers import head_size, heads_of_keys, inner_size, key_size, value_size
from dashq_plugins.formats.gguf.metadata import check_config
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import FAMILIES, SIZES, WINDOWS, YARN, config_of, said
from pico import PLAIN_ROPE

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
    **dict.fromkeys(("gpt2", "gpt_bigcode", "bloom", "falcon", "falcon-grouped", "mpt"), ("", "layer_norm_epsilon")),
}
MIXTURES = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe", "granitemoe", "granitemoeshared", "dots1"),
    *("ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2", "exaone_moe", "afmoe", "solar_open", "lfm2_moe", "jamba"),
    *("qwen3_next", "qwen3_5_moe", "granite4", "granite4-turned", "granite4-attending"),
    *("gemma4-mixture", "deepseek_v2", "glm4_moe_lite", "mimo_v2_flash"),
}


@pytest.mark.parametrize("changes", [{}, {"seq_length": None}])
def test_a_bloom_that_names_no_context_has_that_of_its_family(changes: dict[str, Any], tmp_path: Path) -> None:
    config = config_of("bloom", **(FAMILIES["bloom"][1] | changes))
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
    assert {key: entries.get(key) for key in expected} == expected
    norm, epsilon = NORMS.get(name, ("rms_", "rms_norm_eps"))
    if name != "olmo":
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


@pytest.mark.parametrize(("kinds", "count"), [(["sparse"] * 4, 0), (["dense", "dense", "sparse", "sparse"], 2)])
def test_the_list_of_layers_says_how_many_have_no_experts(kinds: list[str], count: int, tmp_path: Path) -> None:
    config = config_of("exaone_moe", num_hidden_layers=4, mlp_layer_types=kinds, first_k_dense_replace=1)
    check_config(layout_of(config))
    assert said(tmp_path, config)["leading_dense_block_count"] == count


def test_experts_of_as_many_widths_as_layers_are_told_where_all_are_the_same(tmp_path: Path) -> None:
    counts = {"moe_intermediate_size": [96, 96], "moe_topk": [2, 2]}  # as published files of Hunyuan have them
    entries = said(tmp_path, config_of("hunyuan_v1_moe", **counts))
    assert (entries["expert_feed_forward_length"], entries["expert_used_count"]) == (96, 2)


def test_windows_and_both_rotary_bases_of_gemma_are_told(tmp_path: Path) -> None:
    name, changes = FAMILIES["gemma3-linear"]
    entries = said(tmp_path, config_of(name, **changes))
    assert entries["attention.sliding_window"] == 16
    assert entries["attention.sliding_window_pattern"] == [True, False]
    assert (entries["rope.freq_base"], entries["rope.freq_base_swa"]) == (1e4, 1e3)
    assert (entries["rope.scaling.type"], entries["rope.scaling.factor"]) == ("linear", 8.0)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "llama.cpp computes silu in llama, and this model gelu"),
        ("qwen3_moe", {"norm_topk_prob": False}, "lets the weights .* add up to 1, and this model does not"),
        ("qwen2_moe", {"norm_topk_prob": True}, "does not let the weights .* add up to 1, and this model does"),
        ("olmoe", {}, "as many heads of keys as of queries in olmoe"),
        ("smollm3", {"no_rope_layer_interval": 2}, "all layers of smollm3 but every 4th, and this model others"),
        ("stablelm", {"qk_layernorm": True}, "cannot write norms of queries and keys of each head"),
        ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "all layers of gpt-oss a window but each whose number 2 "),
        ("cohere2", {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "each whose number 4 divides"),
        (
            "exaone4",
            WINDOWS | {"layer_types": ["sliding_attention", "full_attention"]},
            "exaone4 where there are 64 lay",
        ),
        ("exaone4", {"sliding_window": 16}, "windows in exaone4 where there are 64 layers, and nowhere else"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "llama.cpp computes gpt-oss with swiglu_limit = 7.0, and here it is 5.0"),
        ("cohere", {"use_qk_norm": True}, "cannot write norms of queries and keys of each head"),
        ("cohere", {"attention_bias": True}, "no place for the biases of command-r, which attention_bias gives it"),
        ("qwen3", {"attention_bias": True}, "no place for the biases of qwen3, which attention_bias gives it"),
        ("olmo3", {"attention_bias": True}, "no place for the biases of olmo2, which attention_bias gives it"),
        ("seed_oss", {"attention_out_bias": True}, "no place for the biases of seed_oss, which attention_out_bias"),
        ("smollm3", {"mlp_bias": True}, "no place for the biases of smollm3, which mlp_bias gives it"),
        ("ernie4_5", {"use_bias": True}, "no place for the biases of ernie4_5, which use_bias gives it"),
        ("glm4_moe", {"n_group": 2}, "among all experts in glm4moe, and this model in 2 groups"),
        ("dots1", {"n_group": 2}, "among all experts in dots1, and this model in 2 groups"),
        (
            "hunyuan_v1_moe",
            {"moe_topk": [1, 2]},
            r"same num_experts_per_tok in all layers, and .* \[1, 2\]",
        ),
        ("ernie4_5_moe", {"moe_layer_end_index": 0}, "in all layers behind the first of ernie4_5-moe that has them"),
        ("exaone_moe", {"mlp_layer_types": ["sparse", "dense"]}, "in all layers behind the first of exaone-moe that"),
        ("falcon", {"alibi": True}, "llama.cpp computes falcon with alibi = False, and here it is True"),
        *(
            (
                family,
                {"layer_types": ["full_attention"] * 2},
                "wants layers with a window in .* and no layer of this mod",
            )
            for family in ("gemma2", "gemma4", "olmo3", "exaone_moe", "mimo_v2_flash")
        ),
        (
            "gemma3",
            {"layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 16},
            "wants layers with a window in gemma3, and no layer of this model has one",
        ),
        ("dots1", {"n_shared_experts": 0}, "wants experts that all tokens have in dots1, and this model has none"),
        ("afmoe", {"num_shared_experts": 0}, "wants experts that all tokens have in afmoe, and this model has none"),
        ("gpt_neox", {"attention_bias": False}, "computes gptneox with attention_bias = True, and here it is False"),
        ("gpt2", {"activation_function": "relu"}, "llama.cpp computes gelu_new in gpt2, and this model relu"),
        ("gpt_neox", {"tie_word_embeddings": True}, "a head of its own in gptneox, and this model's embeddings serve"),
        ("olmo", {"attention_bias": True}, "no place for the biases of olmo, which attention_bias gives it"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": YARN}},
            "embeddings of type 'yarn' in layers with a window",
        ),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": PLAIN_ROPE | {"rope_theta": 1e3}}},
            "turns all layers of olmo2 by one base, and this model those with a window by 1000.0 and others by 10000.0",
        ),
        ("gemma2", {"final_logit_softcapping": None}, "caps the logits, and those of attention, in gemma2"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "see those before them alone in gemma4, and this model all"),
        (
            "gemma3",
            {"query_pre_attn_scalar": 64},
            "divides queries by the root of 16, and this model by that of 64",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_config(layout_of(config_of(family, **changes)))


def test_queries_of_62_layers_are_divided_by_the_root_of_another_width_as_llama_cpp_does() -> None:
    sizes = {"head_dim": 32, "query_pre_attn_scalar": SIZES["hidden_size"] // 4}
    check_config(layout_of(config_of("gemma3", num_hidden_layers=62, **sizes)))
    with pytest.raises(PlanError, match="divides queries by the root of 32, and this model by that of 16"):
        check_config(layout_of(config_of("gemma3", **sizes)))
