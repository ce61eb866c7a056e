"""Models have the architecture and the tensors that llama.cpp knows, and others are told how to become GGUF files."""

import math

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from dashq import PlanError
from dashq.model.transformers_internals import tied_weights
from dashq_plugins.formats.gguf.names import FAMILIES as WRITTEN
from dashq_plugins.formats.gguf.names import in_file, layout_of, place
from gguf_results import FAMILIES, config_of

KNOWN = {name for name, _ in FAMILIES.values()}


def state(config: PretrainedConfig) -> dict[str, Tensor]:
    """The tensors of a model, each with numbers of its own; matrices that the file has in a stack are one there."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in network.state_dict().items():
        stack, number = place(name)
        if name not in tied_weights(network) and not layout_of(config).entry(name):
            shapes[stack] = tuple(tensor.shape) if number is None else (number + 1, *tensor.shape)
    tensors = {name: torch.arange(math.prod(shape), dtype=torch.float32).view(shape) for name, shape in shapes.items()}
    return {
        name: tensor / tensor.numel() ** 2 if name.endswith("A_log") else tensor for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("family", sorted(KNOWN))
def test_every_tensor_has_a_place_of_its_own_and_comes_back(family: str) -> None:
    config = config_of(family, **dict(FAMILIES.values())[family])
    layout = layout_of(config)
    tensors = {name: tensor.mT if layout.transposed(name) else tensor for name, tensor in state(config).items()}
    written = {name: layout.to_file(name, tensor) for name, tensor in tensors.items()}
    places = [place for parts in written.values() for place in parts]
    assert len(places) == len(set(places))
    numbers = sum(part.numel() for parts in written.values() for part in parts.values())
    repeated = 10 * config.num_hidden_layers * 256 if family == "gemma3n" else 0  # for tokens without rows
    assert numbers == sum(tensor.numel() for tensor in tensors.values()) + repeated
    for name, parts in written.items():
        assert list(parts) == list(in_file(layout, name))
        back = layout.from_file(name, list(parts.values()))
        # What is a logarithm in transformers is none in the file, and some of Falcon-H1 is multiplied.
        inexact = name.endswith("A_log") or family == "falcon_h1"
        assert back.allclose(tensors[name], atol=1e-5) if inexact else back.equal(tensors[name]), name


def test_models_are_of_every_known_type() -> None:
    assert {config_of(name, **changes).model_type for name, changes in FAMILIES.values()} == WRITTEN.keys()


@pytest.mark.parametrize(
    ("family", "name", "places"),
    [
        ("llama", "model.embed_tokens.weight", ["token_embd.weight"]),
        ("llama", "model.layers.1.self_attn.q_proj.weight", ["blk.1.attn_q.weight"]),
        ("llama", "model.norm.weight", ["output_norm.weight"]),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias", ["blk.0.attn_k.bias"]),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", ["blk.0.ffn_down_exps.weight"]),
        (
            "mixtral",
            "model.layers.0.mlp.experts.gate_up_proj",
            ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"],
        ),
        (
            "gpt_oss",
            "model.layers.0.mlp.experts.gate_up_proj_bias",
            ["blk.0.ffn_gate_exps.bias", "blk.0.ffn_up_exps.bias"],
        ),
        ("gpt_oss", "model.layers.1.self_attn.sinks", ["blk.1.attn_sinks.weight"]),
        ("gemma4", "model.layers.0.experts.gate_up_proj", ["blk.0.ffn_gate_up_exps.weight"]),
        ("gemma4", "model.layers.0.router.scale", ["blk.0.ffn_gate_inp.scale"]),
        ("gemma4", "model.layers.0.router.per_expert_scale", ["blk.0.ffn_down_exps.scale"]),
        ("granitemoe", "model.layers.0.block_sparse_moe.router.weight", ["blk.0.ffn_gate_inp.weight"]),
        (
            "granitemoeshared",
            "model.layers.0.shared_mlp.input_linear.weight",
            ["blk.0.ffn_gate_shexp.weight", "blk.0.ffn_up_shexp.weight"],
        ),
        ("ernie4_5_moe", "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias", ["blk.1.exp_probs_b.bias"]),
        ("afmoe", "model.layers.1.mlp.expert_bias", ["blk.1.exp_probs_b.bias"]),
        ("gemma3n", "model.altup_projections", ["altup_proj.weight"]),
        ("gemma3n", "model.layers.1.altup.correct_output_scale", ["blk.1.altup_correct_scale.weight"]),
        ("llama4", "model.layers.0.feed_forward.shared_expert.up_proj.weight", ["blk.0.ffn_up_shexp.weight"]),
        (
            "llama4",
            "model.layers.0.feed_forward.experts.gate_up_proj",
            ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"],
        ),
        ("bloom", "transformer.word_embeddings_layernorm.bias", ["token_embd_norm.bias"]),
        ("bloom", "transformer.h.0.post_attention_layernorm.weight", ["blk.0.ffn_norm.weight"]),
        ("gpt2", "transformer.h.0.attn.c_attn.weight", ["blk.0.attn_qkv.weight"]),
        (
            "deepseek_v3",
            "model.layers.0.self_attn.kv_b_proj.weight",
            ["blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"],
        ),
        ("minicpm3", "model.layers.0.self_attn.kv_b_proj.weight", ["blk.0.attn_kv_b.weight"]),
        ("deepseek_v2", "model.layers.0.self_attn.kv_a_layernorm.weight", ["blk.0.attn_kv_a_norm.weight"]),
        ("glm4_moe", "model.layers.1.mlp.gate.e_score_correction_bias", ["blk.1.exp_probs_b.bias"]),
    ],
)
def test_names_are_those_of_llama_cpp(family: str, name: str, places: list[str]) -> None:
    assert list(in_file(layout_of(config_of(family)), name)) == places


@pytest.mark.parametrize(
    ("family", "name", "places"),
    [
        (
            "qwen3_next",
            "model.layers.0.linear_attn.in_proj_qkvz.weight",
            ["blk.0.attn_qkv.weight", "blk.0.attn_gate.weight"],
        ),
        ("qwen3_5", "model.layers.0.linear_attn.dt_bias", ["blk.0.ssm_dt.bias"]),
        ("qwen3_5", "model.layers.0.linear_attn.A_log", ["blk.0.ssm_a"]),
        ("granite4", "model.layers.0.mamba.D", ["blk.0.ssm_d"]),
        ("jamba", "model.layers.0.mamba.dt_proj.weight", ["blk.0.ssm_dt.weight"]),
        ("mamba", "backbone.layers.1.mixer.dt_proj.bias", ["blk.1.ssm_dt.bias"]),
        ("mamba", "backbone.layers.1.mixer.A_log", ["blk.1.ssm_a"]),
        (
            "kimi_linear",
            "model.layers.0.self_attn.conv1d.weight",
            ["blk.0.ssm_conv1d_q.weight", "blk.0.ssm_conv1d_k.weight", "blk.0.ssm_conv1d_v.weight"],
        ),
        ("kimi_linear", "model.layers.0.self_attn.forget_gate.A_log", ["blk.0.ssm_a"]),
        ("kimi_linear", "model.layers.0.self_attn.forget_gate.dt_bias", ["blk.0.ssm_dt.bias"]),
        ("kimi_linear", "model.layers.0.self_attn.forget_gate.f_b_proj.weight", ["blk.0.ssm_f_b.weight"]),
        ("kimi_linear", "model.layers.1.mlp.gate.e_score_correction_bias", ["blk.1.exp_probs_b.bias"]),
        ("mamba2", "backbone.layers.1.mixer.norm.weight", ["blk.1.ssm_norm.weight"]),
        ("falcon_h1", "model.layers.1.pre_ff_layernorm.weight", ["blk.1.ffn_norm"]),
        ("falcon_h1", "model.layers.1.mamba.dt_bias", ["blk.1.ssm_dt.bias"]),
        ("nemotron_h", "model.layers.1.mixer.experts.up_proj", ["blk.1.ffn_up_exps.weight"]),
        ("nemotron_h", "model.layers.1.mixer.gate.e_score_correction_bias", ["blk.1.exp_probs_b.bias"]),
    ],
)
def test_names_of_what_has_states_are_those_of_llama_cpp(family: str, name: str, places: list[str]) -> None:
    base, changes = FAMILIES[family]
    assert list(in_file(layout_of(config_of(base, **changes)), name)) == places


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("granite4", "granitehybrid"),
        ("granite4-dense", "granitehybrid"),
        ("granite4-attending", "granitemoe"),
        ("granite4-attending-dense", "granite"),
        ("nemotron_h", "nemotron_h_moe"),
        ("nemotron_h-dense", "nemotron_h"),
    ],
)
def test_types_of_several_kinds_of_layers_are_of_the_architecture_that_has_those(
    family: str, architecture: str
) -> None:
    name, changes = FAMILIES[family]
    assert layout_of(config_of(name, **changes)).architecture == architecture


def test_a_network_for_all_tokens_is_shared_where_there_are_experts_and_stands_alone_elsewhere() -> None:
    for family, end in (("granite4", "_shexp"), ("granite4-dense", "")):
        name, changes = FAMILIES[family]
        layout = layout_of(config_of(name, **changes))
        places = [f"blk.1.ffn_gate{end}.weight", f"blk.1.ffn_up{end}.weight"]
        assert list(in_file(layout, "model.layers.1.shared_mlp.input_linear.weight")) == places
        assert list(in_file(layout, "model.layers.1.shared_mlp.output_linear.weight")) == [
            f"blk.1.ffn_down{end}.weight"
        ]


def test_a_stack_that_fuses_two_is_cut_between_them() -> None:
    stack = torch.arange(2 * 6 * 4).view(2, 6, 4)
    parts = layout_of(config_of("mixtral")).to_file("model.layers.0.mlp.experts.gate_up_proj", stack)
    gate, up = parts.values()
    assert gate.equal(stack[:, :3])
    assert up.equal(stack[:, 3:])


def test_a_stack_whose_rows_take_turns_is_cut_between_each_two() -> None:
    stack = torch.arange(2 * 6 * 4).view(2, 6, 4)
    parts = layout_of(config_of("gpt_oss")).to_file("model.layers.0.mlp.experts.gate_up_proj", stack)
    gate, up = parts.values()
    assert gate.equal(stack[:, [0, 2, 4]])
    assert up.equal(stack[:, [1, 3, 5]])


def test_what_has_no_place_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"no place for the tensor model\.layers\.0\.mlp\.magic\.weight"):
        in_file(layout_of(config_of("llama")), "model.layers.0.mlp.magic.weight")


def test_who_has_another_model_is_told_how_to_make_a_gguf_file_of_it() -> None:
    words = r"'opt' from safetensors, only of llama, mistral.*convert_hf_to_gguf.py.*architectures: llama, qwen2"
    with pytest.raises(PlanError, match=words) as error:
        layout_of(config_of("opt"))
    assert "\n" not in str(error.value)


def test_a_text_model_with_towers_around_it_is_no_file_of_its_own() -> None:
    with pytest.raises(PlanError, match="holds the text model of 'gemma3' alone: a run reads that from the original"):
        layout_of(transformers.Gemma3Config())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", ("model.layers.0.mlp.up_proj.weight", None)),
        ("model.layers.0.mlp.experts.down_proj.12.weight", ("model.layers.0.mlp.experts.down_proj", 12)),
        ("model.altup_projections.2.weight", ("model.altup_projections", 2)),
        ("model.layers.0.self_attn.q_proj.bias", ("model.layers.0.self_attn.q_proj.bias", None)),
        ("lm_head.weight", ("lm_head.weight", None)),
    ],
)
def test_an_expert_lies_in_its_stack(name: str, expected: tuple[str, int | None]) -> None:
    assert place(name) == expected
