"""What is said of latent attention and of its mixtures, and what llama.cpp computes otherwise there."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from dashq import PlanError, run
from dashq_plugins.formats.gguf.checks import check_config
from dashq_plugins.formats.gguf.latent import check_latent
from dashq_plugins.formats.gguf.names import layout_of
from gguf_results import FAMILIES, LATENT, SIZES, config_of, recipe, said
from pico import pico_model

GATING = gguf.ExpertGatingFuncType


def told(folder: Path, label: str) -> dict[str, Any]:
    name, changes = FAMILIES[label]
    return said(folder, config_of(name, **changes))


@pytest.mark.parametrize("label", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"])
def test_the_cache_is_told_to_hold_latents_and_heads_their_own_sizes(label: str, tmp_path: Path) -> None:
    entries = told(tmp_path, label)
    assert (entries["attention.q_lora_rank"], entries["attention.kv_lora_rank"]) == (32, 32)
    assert (entries["attention.head_count_kv"], entries["attention.key_length"]) == (1, 48)
    assert (entries["attention.value_length"], entries["rope.dimension_count"]) == (32, 16)
    assert (entries["attention.key_length_mla"], entries["attention.value_length_mla"]) == (32, 16)


def test_minicpm3_is_told_to_hold_all_keys_and_values(tmp_path: Path) -> None:
    entries = told(tmp_path, "minicpm3")
    assert (entries["attention.head_count_kv"], entries["attention.key_length"]) == (4, 32)
    assert (entries["attention.value_length"], entries["rope.dimension_count"]) == (16, 16)
    assert "attention.key_length_mla" not in entries


def test_queries_that_are_made_in_one_step_have_a_rank_of_0(tmp_path: Path) -> None:
    assert told(tmp_path, "deepseek_v2-lite")["attention.q_lora_rank"] == 0


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("deepseek_v2", (GATING.SOFTMAX, False, 1, None, None)),
        ("deepseek_v3", (GATING.SIGMOID, True, 1, 2, 1)),
        ("glm4_moe_lite", (GATING.SIGMOID, True, 1, None, None)),
        ("youtu", (None, None, 2, None, None)),
    ],
)
def test_how_experts_are_chosen_is_told(label: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    entries = told(tmp_path, label)
    names = ("gating_func", "weights_norm", "group_count", "group_used_count")
    scoring, norms, groups, chosen = (entries.get(f"expert_{name}") for name in names)
    assert (scoring, norms, entries["leading_dense_block_count"], groups, chosen) == expected


def test_groups_of_which_all_are_chosen_are_none(tmp_path: Path) -> None:
    entries = said(tmp_path, config_of("deepseek_v3", **LATENT, n_group=2, topk_group=2))
    assert "expert_group_count" not in entries


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("deepseek_v3", {"rope_interleave": False}, "neighbouring columns in deepseek2, and this model those half"),
        ("minicpm3", {"q_lora_rank": None}, "in two steps in minicpm3, and this model in one"),
        ("deepseek_v3", {"num_hidden_layers": 27}, "in one step where deepseek2 has 27 layers and 320 tokens, and"),
        ("deepseek_v3", {"num_hidden_layers": 48, "vocab_size": 128256}, "48 layers and 128256 tokens, and this mod"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "groups of experts by their two best, and this model"),
        ("deepseek_v2", {"norm_topk_prob": True}, "never lets the weights .* add up to 1 in deepseek_v2"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_latent(layout_of(config_of(family, **LATENT | changes)))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (
            "deepseek_v3",
            {"attention_bias": True},
            "no place for the biases of deepseek2, which attention_bias gives it",
        ),
        ("deepseek_v2", {"topk_method": "greedy", "mlp_bias": True}, "biases of deepseek2, which mlp_bias gives it"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"]}, "experts in all layers behind the first of deepse"),
        ("minicpm3", {"scale_emb": 1}, "computes minicpm3 with scale_emb = 12, and here it is 1"),
        ("minicpm3", {"scale_depth": 1.0}, "computes minicpm3 with scale_depth = 1.4, and here it is 1.0"),
        ("minicpm3", {"dim_model_base": 64}, "computes minicpm3 with dim_model_base = 256, and here it is 64"),
    ],
)
def test_what_it_has_no_place_for_is_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        check_config(layout_of(config_of(family, **LATENT | changes)))


def test_quantized_keys_and_values_are_refused_with_what_to_do(tmp_path: Path) -> None:
    name, changes = FAMILIES["deepseek_v3"]
    model = pico_model(name, tmp_path / "model", torch.float16, **SIZES | changes)
    words = r"layers\.0\.self_attn\.kv_b_proj: .* keys of this matrix column by column.*kv_b_proj', skip: true"
    file = run(recipe(model, tmp_path / "first")) / "model.gguf"
    for source in (model, file):
        with pytest.raises(PlanError, match=words):
            run(recipe(source, tmp_path / "out", overrides=[]))
