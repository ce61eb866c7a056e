"""GGUF files of every family: what they say of the model, and what is refused before the run."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from commands import call
from dashq import PlanError, run
from dashq.measuring.analysis import Analysis
from dashq.results.checkpoint import open_checkpoint, open_network
from dashq.results.convert import convert
from dashq.results.verify import verify
from dashq_plugins.formats.gguf.blocks import TYPES
from dashq_plugins.formats.gguf.layers import heads_of_keys, key_size
from dashq_plugins.formats.gguf.serializer import GgufSerializer
from format_results import FormatResults
from gguf_results import SIZES, YARN, fields, recipe, unknown_pre_tokenizer
from pico import WIDE, pico_model
from recipes import FEEDBACK, build_recipe, small_scheme

IDS = torch.arange(20)[None]


def test_every_family_opens_with_the_solvers_numbers(result: tuple[Path, Path]) -> None:
    model, folder = result
    assert all(check.passed for check in verify(folder, "gguf"))
    checkpoint = open_checkpoint(folder)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name in checkpoint.layers:
        stack, _, number = name.rpartition(".")
        weight = (
            plain.get_parameter(stack)[int(number)] if number.isdecimal() else plain.get_parameter(f"{name}.weight")
        )
        values = checkpoint.quantized(name).dequantize()
        turned = values.shape != weight.shape or plain.config.model_type == "gpt2"  # which hold inputs before outputs
        weight.data.copy_(values.mT if turned else values)
    with torch.inference_mode():
        assert torch.allclose(open_network(folder, torch.float32)(IDS).logits, plain(IDS).logits, atol=1e-4)


def test_the_file_says_what_the_configuration_says(result: tuple[Path, Path]) -> None:
    model, folder = result
    config, entries = AutoConfig.from_pretrained(model), fields(folder)
    arch = entries["general.architecture"]
    assert entries[f"{arch}.embedding_length"] == config.hidden_size
    if arch in ("mamba", "mamba2"):  # nothing attends
        assert entries[f"{arch}.attention.head_count"] == 0
        assert entries[f"{arch}.ssm.state_size"] == config.state_size
    else:
        assert entries[f"{arch}.attention.head_count_kv"] == heads_of_keys(config)
        assert entries[f"{arch}.attention.key_length"] == key_size(config)
        reach = {"mistral": 64, "cwm": 128, "ministral": 128}
        assert entries[f"{arch}.context_length"] == reach.get(config.model_type, 256)
    assert entries["general.quantization_version"] == 2
    assert entries["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    assert len(entries["tokenizer.ggml.tokens"]) == config.vocab_size
    assert entries["tokenizer.ggml.eos_token_id"] == 0
    if arch == "gemma3":
        assert entries["gemma3.attention.sliding_window"] == 16
        assert entries["gemma3.attention.sliding_window_pattern"] == [True, False]
    if config.model_type in ("mixtral", "qwen3_moe"):
        assert (entries[f"{arch}.expert_count"], entries[f"{arch}.expert_used_count"]) == (4, 2)


@pytest.mark.parametrize(
    ("family", "changes", "damage", "reason"),
    [
        (
            "opt",
            {"ffn_dim": 96, "word_embed_proj_dim": 64},
            None,
            "cannot write GGUF files of model type 'opt' from safetensors, only of llama, mistral",
        ),
        (
            "llama",
            {"rope_parameters": YARN | {"beta_fast": 16}},
            None,
            "llama.cpp computes YaRN with beta_fast = 32, and here it is 16",
        ),
        ("llama", {"hidden_act": "gelu"}, None, "llama.cpp computes silu in llama, and this model gelu"),
        (
            "gemma3",
            {"query_pre_attn_scalar": 64},
            None,
            "divides queries by the root of 16, and this model by that of 64",
        ),
        ("qwen3_moe", {"norm_topk_prob": False}, None, "experts add up to 1, and this model does not"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, None, "no place for the tensor model.layers.1.mlp.gate_proj.weight"),
        ("llama", {}, unknown_pre_tokenizer, "name for the tokenizer's pre-tokenizer is not known; give it as"),
    ],
)
def test_what_llama_cpp_would_not_run_is_refused_before_a_weight_is_read(
    family: str, changes: dict[str, Any], damage: Any, reason: str, tmp_path: Path
) -> None:
    model = pico_model(family, tmp_path / "model", torch.float16, **(SIZES | changes))
    if damage:
        damage(model)
    unfit = recipe(model, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dashq.model.decoder.Model._read", None)  # whoever reads a weight fails otherwise
        with pytest.raises(PlanError, match=reason):
            run(unfit)
    assert not (tmp_path / "out").exists()
    outcome = call("plan", tmp_path / "out.yaml")
    assert outcome.code == 2
    assert reason.split(" is not known")[0] in " ".join(outcome.errors.split())


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (
            {"match": ".*experts.down_proj.3", "skip": True},
            "all 4 experts of a stack, and of these 3 are quantized, to 4",
        ),
        (
            {"match": ".*experts.down_proj.3", "bits": 5},
            "experts.down_proj: format gguf has one type for all 4 experts .* to 4 bits in groups of 32 and 5 bits in",
        ),
    ],
)
def test_experts_of_a_stack_have_one_type(override: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = pico_model("mixtral", tmp_path / "model", torch.float16, **SIZES)
    with pytest.raises(PlanError, match=reason):
        run(recipe(model, tmp_path / "out", overrides=[override]))
    assert not (tmp_path / "out").exists()


def test_matrices_that_hold_inputs_before_outputs_can_stay_as_they_are(tmp_path: Path) -> None:
    sizes: dict[str, Any] = SIZES | {"n_embd": 64, "n_inner": 96}
    model = pico_model("gpt2", tmp_path / "model", torch.float16, **sizes)
    folder = run(recipe(model, tmp_path / "out", overrides=[{"match": ".*c_attn", "skip": True}]))
    expected, opened = AutoModelForCausalLM.from_pretrained(model), open_network(folder, torch.float16)
    name = "transformer.h.1.attn.c_attn.weight"
    assert opened.state_dict()[name].equal(expected.state_dict()[name])
    assert all(check.passed for check in verify(folder, "gguf"))


def test_experts_can_stay_as_they_are(tmp_path: Path) -> None:
    model = pico_model("mixtral", tmp_path / "model", torch.float16, **SIZES)
    folder = run(recipe(model, tmp_path / "out", overrides=[{"match": ".*experts.*", "skip": True}]))
    experts = AutoModelForCausalLM.from_pretrained(model).model.layers[1].mlp.experts
    opened: Any = open_network(folder, torch.float16)
    assert opened.model.layers[1].mlp.experts.gate_up_proj.equal(experts.gate_up_proj)
    assert opened.model.layers[1].mlp.experts.down_proj.equal(experts.down_proj)


@pytest.mark.parametrize("label", [*TYPES, "IQ2_S", "IQ3_S", "IQ4_XS", "IQ4_NL"])
def test_the_gguf_package_dequantizes_the_blocks_bit_by_bit(label: str, results: FormatResults) -> None:
    assert all(check.passed for check in verify(results[label], "gguf"))
    reader = gguf.GGUFReader(results[label] / "model.gguf")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if tensor.name.endswith("ffn_down.weight")}
    assert kinds == {label}


def test_a_budget_takes_the_type_that_loses_least_in_the_files_own_bytes(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 24}
    settings: dict[str, Any] = {**WIDE, **sizes, "num_hidden_layers": 1, "initializer_range": 0.1}
    model = pico_model("llama", tmp_path / "model", torch.float16, **settings)
    wanted = 4.75
    recipe = build_recipe(
        model,
        tmp_path / "out",
        scheme=small_scheme(32, bits=4, type="IQ4_NL", estimator="hybrid", solver=FEEDBACK),
        budget={"bits_per_weight": wanted, "bits": [4, 5]},
        serializer="gguf",
    )
    folder = run(recipe)
    checkpoint, analysis = open_checkpoint(folder), Analysis.load(folder)
    assert analysis
    assert checkpoint.report
    for report in checkpoint.report.layers:
        choices = analysis.by_name[report.name].choices
        names = {choice.type or {4: "Q4_K", 5: "Q5_1"}[choice.bits] for choice in choices}
        plain = {"IQ4_NL", "Q4_1", "Q4_0", "Q5_1", "Q5_0"}
        assert names == plain | ({"Q4_K", "IQ4_XS", "Q5_K"} if report.columns == 256 else set())
        (chosen,) = [choice for choice in choices if (choice.bits, choice.type) == (report.bits, report.type)]
        assert all(chosen.sensitivity <= choice.sensitivity for choice in choices if choice.bytes <= chosen.bytes)
    kinds = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    packed = [tensor for tensor in kinds.values() if tensor.name.startswith("blk.") and tensor.n_elements > 96]
    assert len(packed) == len(checkpoint.layers)
    assert (
        wanted - 0.5
        < 8 * sum(int(tensor.n_bytes) for tensor in packed) / sum(int(tensor.n_elements) for tensor in packed)
        <= wanted
    )
    assert len({tensor.tensor_type for tensor in packed}) > 1
    assert all(check.passed for check in verify(folder, "gguf"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheme": {"type": "Q5_0"}}, "format gguf has no type 'Q5_0' at 4 bits: possible are Q4_K, IQ4_XS, IQ4_NL"),
        ({"scheme": {"type": "Q4_1"}, "serializer": "mlx"}, "no type 'Q4_1' at 4 bits: it has one alone there"),
        ({"budget": {"types": ["Q4_2"]}}, "budget.types: format gguf has no Q4_2 at the bits on offer; possible are:"),
        ({"budget": {"types": ["Q4_1"], "bits": [4, 5]}}, "budget.types: none is of 5 bits; possible at the bits on"),
        ({"budget": {"types": ["Q5_1"], "bits": 5}}, "cannot be met: the least possible is 6, with 5 bits in groups"),
        ({"budget": {"types": ["Q4_0"], "bits": 4}}, "is 4.5, with 4 bits (Q4_0) in groups of 32"),
    ],
)
def test_types_that_the_format_has_not_are_refused_with_those_that_it_has(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **WIDE)
    scheme = small_scheme(32, bits=4, type="Q4_0") | changes.get("scheme", {})
    budget = {"bits_per_weight": 4.25} | changes["budget"] if "budget" in changes else None
    recipe = build_recipe(
        model, tmp_path / "out", scheme=scheme, budget=budget, serializer=changes.get("serializer", "gguf")
    )
    with pytest.raises(PlanError) as error:
        run(recipe)
    assert reason in str(error.value)


def test_the_type_of_a_scheme_goes_with_its_bits(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **WIDE)
    overrides = [{"match": ".*down_proj", "bits": 5}, {"match": ".*up_proj", "type": "Q4_1"}]
    scheme = small_scheme(32, bits=4, type="Q4_0", solver="rtn")
    folder = run(build_recipe(model, tmp_path / "out", scheme=scheme, overrides=overrides, serializer="gguf"))
    again = convert(folder, GgufSerializer(four_bits="Q4_1"), tmp_path / "again")
    for written in (folder, again):
        tensors = gguf.GGUFReader(written / "model.gguf").tensors
        kinds = {tensor.name.split(".")[-2]: tensor.tensor_type.name for tensor in tensors if "blk.0" in tensor.name}
        assert (kinds["ffn_down"], kinds["ffn_up"], kinds["attn_q"]) == ("Q5_1", "Q4_1", "Q4_0")
        assert all(check.passed for check in verify(written, "gguf"))
