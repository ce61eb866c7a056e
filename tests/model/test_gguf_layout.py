"""Tensors of a GGUF file are turned and shifted where llama.cpp has them so, and nowhere else."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    ApertusConfig,
    BambaConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MiniCPM3Config,
    PretrainedConfig,
)

from dashq.model.gguf_layout import GgufLayout, key_heads
from tensors import noise

LLAMA = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
GEMMA = Gemma3TextConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
ATTENTION = "model.layers.0.self_attn"
# The rows of the first heads of 8 and of 16, their halves interleaved by hand.
BY_HAND = {"q_proj": [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13], "k_proj": [0, 8, 1, 9, 2, 10, 3, 11]}


def in_file(architecture: str, config: PretrainedConfig, name: str, tensor: Tensor) -> Tensor:
    """The one tensor of a file that holds these values of a parameter."""
    (result,) = GgufLayout(architecture, config).to_file(name, tensor).values()
    return result


@pytest.mark.parametrize("part", BY_HAND)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_the_halves_of_rotary_heads_are_interleaved_for_llama_alone(part: str, kind: str) -> None:
    rows, name = torch.arange(32), f"{ATTENTION}.{part}.{kind}"
    assert in_file("llama", LLAMA, name, rows).tolist()[: len(BY_HAND[part])] == BY_HAND[part]
    for architecture in ("qwen2", "qwen3", "phi3", "gemma3"):
        assert in_file(architecture, LLAMA, name, rows).equal(rows)
    assert in_file("llama", LLAMA, f"{ATTENTION}.v_proj.{kind}", rows).equal(rows)


def test_halves_of_the_part_that_turns_are_interleaved_and_the_rest_stays() -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    rows = in_file("granitehybrid", BambaConfig(**sizes), f"{ATTENTION}.q_proj.weight", torch.arange(16))
    assert rows.tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.input_layernorm.weight", f"{ATTENTION}.q_norm.weight"]
)
def test_norms_of_gemma_and_nemotron_alone_lack_one(name: str) -> None:
    factor = noise(0, 8).bfloat16()
    for architecture in ("gemma3",) if "q_norm" in name else ("gemma", "gemma2", "gemma3", "nemotron"):
        assert in_file(architecture, GEMMA, name, factor).equal(factor.float() + 1)
        assert in_file(architecture, GEMMA, "model.layers.0.mlp.up_proj.weight", factor).equal(factor)
    assert in_file("qwen3", LLAMA, name, factor).equal(factor)


@pytest.mark.parametrize(("architecture", "config"), [("llama", LLAMA), ("gemma3", GEMMA)])
def test_what_is_written_is_read_back(architecture: str, config: PretrainedConfig) -> None:
    layout = GgufLayout(architecture, config)
    for name in (f"{ATTENTION}.q_proj.weight", f"{ATTENTION}.k_proj.weight", "model.norm.weight"):
        tensor = noise(0, 32, 4).round()
        assert layout.from_file(name, list(layout.to_file(name, tensor).values())).equal(tensor)


def test_a_parameter_without_a_place_has_no_name() -> None:
    assert GgufLayout("llama", LLAMA).names("model.layers.1.mlp.up_proj.weight") == ("blk.1.ffn_up.weight",)
    assert GgufLayout("llama", LLAMA).names("model.layers.1.mlp.magic.weight") == ()


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_up_proj_bias"])
def test_experts_of_gpt_oss_have_gates_and_the_rest_in_turn(name: str) -> None:
    layout, parameter = GgufLayout("gpt-oss", LLAMA), f"model.layers.0.mlp.experts.{name}"
    stack = noise(0, 2, 6) if name.endswith("bias") else noise(0, 2, 6, 4)
    gate, up = layout.to_file(parameter, stack).values()
    assert gate.equal(stack[:, ::2])
    assert up.equal(stack[:, 1::2])
    assert layout.from_file(parameter, [gate, up]).equal(stack)


def test_stacks_of_gpt_oss_alone_are_transposed_and_their_biases_are_not() -> None:
    stacks, others = ("gate_up_proj", "down_proj"), ("gate_up_proj_bias", "down_proj_bias")
    transposed = GgufLayout("gpt-oss", LLAMA).transposed
    assert all(transposed(f"model.layers.0.mlp.experts.{name}") for name in stacks)
    assert not any(transposed(f"model.layers.0.mlp.experts.{name}") for name in others)
    assert not GgufLayout("llama", LLAMA).transposed("model.layers.0.mlp.experts.down_proj")


def test_matrices_of_gpt2_are_transposed_and_its_embeddings_are_not() -> None:
    transposed = GgufLayout("gpt2", LLAMA).transposed
    assert all(transposed(f"transformer.h.0.{name}.weight") for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc"))
    assert not any(transposed(f"transformer.{name}") for name in ("wte.weight", "h.0.attn.c_attn.bias"))


@pytest.mark.parametrize(
    ("architecture", "config", "rows"),
    [
        # Two heads of two columns, each with its key and value: the letters of queries, keys and values by heads.
        ("gptneox", GPTNeoXConfig(num_attention_heads=2), "q0 k0 v0 q1 k1 v1"),
        ("bloom", BloomConfig(n_head=2), "q0 k0 v0 q1 k1 v1"),
        ("falcon", FalconConfig(num_attention_heads=2, multi_query=False), "q0 k0 v0 q1 k1 v1"),
        ("falcon", FalconConfig(num_attention_heads=2, multi_query=True), "q0 q1 k0 v0"),
        (
            "falcon",
            FalconConfig(num_attention_heads=4, new_decoder_architecture=True, num_kv_heads=2),
            "q0 q1 k0 v0 q2 q3 k1 v1",
        ),
        ("starcoder", GPTBigCodeConfig(n_head=2, multi_query=True), "q0 q1 k0 v0"),
    ],
)
def test_all_queries_come_first_then_all_keys_then_all_values(
    architecture: str, config: PretrainedConfig, rows: str
) -> None:
    part = "attn.c_attn" if architecture == "starcoder" else "self_attention.query_key_value"
    given = rows.split()
    numbers = torch.arange(2 * len(given))
    layout = GgufLayout(architecture, config)
    (order,) = layout.to_file(f"transformer.h.0.{part}.bias", numbers).values()
    assert [given[row // 2] for row in order[::2].tolist()] == sorted(given, key=lambda name: "qkv".index(name[0]))
    assert order[1::2].equal(order[::2] + 1)
    assert layout.from_file(f"transformer.h.0.{part}.bias", [order]).equal(numbers)


def test_a_matrix_that_fuses_two_is_cut_between_them() -> None:
    layout, name = GgufLayout("granitemoe", LLAMA), "model.layers.0.shared_mlp.input_linear.weight"
    gate, up = layout.to_file(name, noise(0, 6, 4)).values()
    assert gate.equal(noise(0, 6, 4)[:3])
    assert layout.from_file(name, [gate, up]).equal(noise(0, 6, 4))


def test_heads_share_keys_in_groups_all_of_them_or_not_at_all() -> None:
    assert key_heads(LLAMA) == 2
    assert key_heads(BloomConfig(n_head=8)) == 8
    assert [key_heads(FalconConfig(num_attention_heads=8, multi_query=one)) for one in (True, False)] == [1, 8]
    assert key_heads(FalconConfig(num_attention_heads=8, new_decoder_architecture=True, num_kv_heads=2)) == 2


def test_a_vector_that_scales_a_matrix_has_its_name() -> None:
    layout = GgufLayout("gemma4", GEMMA)
    assert layout.names("model.layers.0.router.scale") == ("blk.0.ffn_gate_inp.scale",)
    assert GgufLayout("llama", LLAMA).names("model.layers.0.router.per_expert_scale") == ("blk.0.ffn_down_exps.scale",)


def test_keys_of_latent_attention_lie_column_by_column_and_values_row_by_row() -> None:
    config = DeepseekV3Config(
        num_hidden_layers=2, num_attention_heads=2, qk_nope_head_dim=3, v_head_dim=4, kv_lora_rank=5
    )
    layout, name = GgufLayout("deepseek2", config), f"{ATTENTION}.kv_b_proj.weight"
    matrix = noise(0, 2 * (3 + 4), 5)
    keys, values = layout.to_file(name, matrix).values()
    for head in range(2):
        own = matrix[7 * head : 7 * head + 7]
        assert keys[head].mT.equal(own[:3])
        assert values[head].equal(own[3:])
    assert layout.from_file(name, [keys, values]).equal(matrix)


def test_keys_are_turned_in_architectures_with_two_names_for_their_matrix() -> None:
    name, config = f"{ATTENTION}.kv_b_proj.weight", MiniCPM3Config(num_hidden_layers=2)
    assert GgufLayout("deepseek2", LLAMA).turns_keys(name)
    assert not GgufLayout("deepseek2", LLAMA).turns_keys(f"{ATTENTION}.q_b_proj.weight")
    assert not GgufLayout("minicpm3", config).turns_keys(name)
    matrix = noise(0, 14, 5)
    assert in_file("minicpm3", config, name, matrix).equal(matrix)


def test_what_an_activation_learned_is_an_entry_of_the_file() -> None:
    layout = GgufLayout("apertus", ApertusConfig())
    assert layout.entry("model.layers.12.mlp.act_fn.alpha_p") == ("xielu.alpha_p", 12)
    assert layout.entry("model.layers.12.mlp.up_proj.weight") is None


def test_tokens_without_a_row_for_each_layer_have_that_of_the_first() -> None:
    """So transformers looks them up; packed rows are copied as they are."""
    layout = GgufLayout("gemma3n", Gemma3nTextConfig(vocab_size=7, vocab_size_per_layer_input=5))
    name, table = "model.embed_tokens_per_layer.weight", torch.arange(10).view(5, 2)
    (rows,) = layout.to_file(name, table).values()
    assert rows.equal(table[[0, 1, 2, 3, 4, 0, 0]])
    assert layout.from_file(name, [rows]).equal(table)
