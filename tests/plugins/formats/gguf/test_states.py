"""What is said of layers with states, and what llama.cpp computes otherwise there, or has in another order."""

from pathlib import Path
from typing import Any

import pytest

from dashq import Layer, PlanError, StoredLayer, run
from dashq_plugins.formats.gguf.blocks import named
from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.names import layout_of
from dashq_plugins.formats.gguf.states import check_columns, check_states
from gguf_results import FAMILIES, SIZES, config_of, recipe, said
from pico import pico_model

# Filters, the size of a state, groups that share its inputs, heads, and the columns of all of them.
LINEAR = (4, 32, 2, 4, 128)
MAMBA = (4, 16, 2, 8, 128)
NORMED = "ssm.dt_b_c_rms"  # whether steps, keys and queries are


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        *((name, LINEAR) for name in ("qwen3_next", "qwen3_5", "qwen3_5_moe")),
        *((name, MAMBA) for name in ("granite4", "granite4-dense", "bamba", "nemotron_h", "nemotron_h-dense")),
        ("granite4-attending", ()),
        ("jamba", (4, 16, 0, 32, 128)),
        ("mamba", (4, 16, 0, 32, 128)),
        ("falcon_mamba", (4, 16, 0, 32, 128)),
        ("mamba2", MAMBA),
        ("falcon_h1", (4, 16, 1, 6, 96)),
        ("kimi_linear", (4, 0, 0, 0, 0)),
    ],
)
def test_the_sizes_of_states_are_told(family: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    name, changes = FAMILIES[family]
    entries = said(tmp_path, config_of(name, **changes))
    words = ("conv_kernel", "state_size", "group_count", "time_step_rank", "inner_size")
    expected = {f"ssm.{word}": size for word, size in zip(words, sizes, strict=bool(sizes)) if size}
    sizes_told = {key: value for key, value in entries.items() if key.startswith("ssm.") and key != NORMED}
    assert sizes_told == expected
    assert entries.get(NORMED, False) == (family == "falcon_mamba")


@pytest.mark.parametrize("interval", [2, 4])
def test_the_number_of_the_first_layer_that_attends_to_all_is_told(interval: int, tmp_path: Path) -> None:
    kinds = [*["linear_attention"] * (interval - 1), "full_attention"] * 2
    config = config_of("qwen3_5", num_hidden_layers=len(kinds), layer_types=kinds)
    check_states(layout_of(config))
    assert said(tmp_path, config)["full_attention_interval"] == interval


def test_layers_without_attention_have_no_heads_of_keys_and_heads_may_turn_nothing(tmp_path: Path) -> None:
    for family, turned in (("granite4", False), ("granite4-turned", True), ("bamba", True)):
        name, changes = FAMILIES[family]
        entries = said(tmp_path, config_of(name, **changes))
        assert (entries["attention.head_count_kv"], entries["rope.scaling.finetuned"]) == ([0, 2], turned)


def test_a_jamba_of_one_expert_has_none(tmp_path: Path) -> None:
    name, changes = FAMILIES["jamba"]
    assert not [key for key in said(tmp_path, config_of(name, **changes, num_experts=1)) if "expert" in key]


def test_each_block_of_nemotron_is_of_one_kind(tmp_path: Path) -> None:
    name, changes = FAMILIES["nemotron_h"]
    entries = said(tmp_path, config_of(name, **changes, moe_latent_size=32, moe_shared_expert_intermediate_size=64))
    assert (entries["attention.head_count_kv"], entries["feed_forward_length"]) == ([0, 0, 2, 0], [0, 64, 0, 64])
    assert (entries["moe_latent_size"], entries["expert_shared_feed_forward_length"]) == (32, 64)


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (
            "qwen3_5",
            {"layer_types": ["full_attention", "linear_attention"]},
            "in all layers of qwen35 but each whose number one number divides, and this model in others",
        ),
        ("qwen3_next", {"layer_types": ["full_attention"] * 2}, "in all layers of qwen3next but each whose number one"),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 2}, "in all layers of qwen3next but each whose number"),
        (
            "qwen3_5_moe",
            {"linear_key_head_dim": 16},
            "of one size in the linear attention of qwen35moe, and this model keys of 16 and values of 32",
        ),
        ("qwen3_next", {"attention_bias": True}, "no place for the biases of qwen3next, which attention_bias gives it"),
        ("qwen3_5", {"attention_bias": True}, "no place for the biases of qwen35, which attention_bias gives it"),
        ("qwen3_next", {"norm_topk_prob": False}, "lets the weights .* add up to 1, and this model does not"),
        (
            "granite4",
            {"time_step_limit": [0.0, 0.1]},
            r"computes granitehybrid with time_step_limit = \(0.0, inf\), and here it is \(0.0, 0.1\)",
        ),
        (
            "granite4",
            {"mamba_proj_bias": True},
            "computes granitehybrid with mamba_proj_bias = False, and here it is T",
        ),
        (
            "bamba",
            {"mamba_conv_bias": False},
            "computes granitehybrid with mamba_conv_bias = True, and here it is False",
        ),
        (
            "granite4",
            {"mamba_expand": 4, "mamba_d_head": 32},
            "computes granitehybrid with mamba_expand = 2, and here it is 4",
        ),
        ("jamba", {"mamba_expand": 4}, "computes jamba with mamba_expand = 2, and here it is 4"),
        (
            "granite4",
            {"layer_types": ["linear_attention"] * 2},
            "others that attend in granitehybrid, and this model has linear_attention$",
        ),
        ("bamba", {"attn_layer_indices": [0, 1]}, "in granitehybrid, and this model has full_attention$"),
        ("jamba", {"attn_layer_period": 1, "attn_layer_offset": 0}, "in jamba, and this model has full_attention$"),
        (
            "nemotron_h",
            {"layers_block_type": ["full_attention", "moe"]},
            "in nemotron_h_moe, and this model has full_attention, moe$",
        ),
        ("nemotron_h", {"n_shared_experts": 0}, "that all tokens have in nemotron_h_moe, and this model has none"),
        ("granite4-attending", {"position_embedding_type": None}, "turns heads in granitemoe, and this model does not"),
        ("mamba", {"intermediate_size": 192}, "twice as many columns inside layers of mamba .* this model 192 and 64"),
        ("mamba", {"use_conv_bias": False}, "computes mamba with use_conv_bias = True, and here it is False"),
        ("falcon_mamba", {"use_bias": True}, "computes mamba with use_bias = False, and here it is True"),
        ("mamba2", {"use_bias": True}, "computes mamba2 with use_bias = False, and here it is True"),
        ("mamba2", {"expand": 4, "head_dim": 32}, "computes mamba2 with expand = 2, and here it is 4"),
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"mamba2 with time_step_limit = \(0.0, inf\), and here it is"),
        ("mamba", {"hidden_act": "gelu"}, "llama.cpp computes silu in mamba, and this model gelu"),
        ("jamba", {"mamba_proj_bias": True}, "computes jamba with mamba_proj_bias = False, and here it is True"),
        ("nemotron_h", {"use_conv_bias": False}, "computes nemotron_h_moe with use_conv_bias = True, and here it is F"),
        ("nemotron_h-dense", {"mlp_bias": True}, "computes nemotron_h with mlp_bias = False, and here it is True"),
        ("nemotron_h", {"time_step_min": 0.01}, "any length in nemotron_h_moe, and this model none shorter than 0.01"),
        ("nemotron_h", {"n_group": 2}, "among all experts in nemotron_h_moe, and this model in 2 groups"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "llama.cpp computes relu2 in nemotron_h, and this model silu"),
        (
            "nemotron_h",
            {"layers_block_type": ["linear_attention", "mlp", "moe", "full_attention"]},
            "experts in all feed-forward networks of nemotron_h_moe, and this model in some",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    name, own = FAMILIES[family]
    with pytest.raises(PlanError, match=reason):
        check_config(layout_of(config_of(name, **(own | changes))))


@pytest.mark.parametrize(
    ("kind", "keys", "size", "fits"),
    [
        ("Q4_1", 2, 32, True),
        ("Q4_K", 2, 128, False),
        ("Q4_K", 2, 256, True),
        ("Q4_K", 4, 128, True),
        ("Q4_1", 2, 48, False),
    ],
)
def test_blocks_of_columns_move_where_heads_are_made_of_them(kind: str, keys: int, size: int, fits: bool) -> None:
    heads = {"linear_num_key_heads": keys, "linear_value_head_dim": size, "linear_key_head_dim": size}
    layer = Layer(name="model.layers.0.linear_attn.out_proj", rows=64, columns=4 * size)
    stored = StoredLayer(layer=layer, grid=named(kind).grid, size=named(kind).size, ordered=False)
    layout = layout_of(config_of("qwen3_5", **heads))
    if fits:
        check_columns(layout, [stored])
    else:
        words = f"out_proj: a GGUF file of qwen35 has the heads of {size} columns in another order, and {kind} has bl"
        with pytest.raises(PlanError, match=words):
            check_columns(layout, [stored])


def test_blocks_that_hold_columns_of_two_heads_are_refused_in_the_plan(tmp_path: Path) -> None:
    sizes = {**SIZES, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    model = pico_model("qwen3_5", tmp_path / "model", **sizes)
    unfit = recipe(model, tmp_path / "out")
    with pytest.raises(PlanError, match="has the heads of 16 columns in another order, and Q4_1 has blocks of 32"):
        run(unfit)
