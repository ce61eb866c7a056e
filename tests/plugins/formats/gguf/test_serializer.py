"""GGUF files of every family: what they say of the model, its tokenizer, and what is refused before the run."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from commands import call
from dashq import CheckpointError, PlanError, Recipe, run
from dashq.results.checkpoint import open_checkpoint, open_network
from dashq.results.verify import verify
from dashq_plugins.formats.gguf.programs import in_float32, rewrite, round_to_8_bits
from format_results import FormatResults
from pico import pico_model
from recipes import build_recipe

IDS = torch.arange(20)[None]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.1}
LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LONG | {"original_max_position_embeddings": 16}}),
    "llama-untied-biased": ("llama-untied-biased", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 16}),
    "gemma3-linear": (
        "gemma3",
        {
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
}
SCHEME = {
    "bits": 4,
    "estimator": "diagonal",
    "grouper": {"name": "contiguous", "size": 32},
    "solver": "irls",
    "router": "routed",
}
FORMAT = {"name": "gguf", "four_bits": "Q4_1"}


def recipe(model: Path, output: Path, **changes: Any) -> Recipe:
    usual: dict[str, Any] = {"scheme": SCHEME, "serializer": FORMAT, "certificate_groups": 0}
    return build_recipe(model, output, **(usual | changes))


@pytest.fixture(scope="module", params=FAMILIES)
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of one family, and its result."""
    folder = tmp_path_factory.mktemp(request.param)
    name, changes = FAMILIES[request.param]
    dtype = torch.bfloat16 if name in ("qwen2", "gemma3") else torch.float16
    model = pico_model(name, folder / "model", dtype, **(SIZES | changes))
    return model, run(recipe(model, folder / "out"))


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
        weight.data.copy_(checkpoint.quantized(name).dequantize())
    with torch.inference_mode():
        assert torch.allclose(open_network(folder, torch.float32)(IDS).logits, plain(IDS).logits, atol=1e-4)


@pytest.mark.parametrize("program", ["llama.cpp", "llama.cpp-float32"])
def test_llama_cpp_computes_the_same(program: str, result: tuple[Path, Path]) -> None:
    pytest.importorskip("llama_cpp")
    *_, logits = verify(result[1], program)
    assert logits.passed, logits


@given(st.integers(0, 999), st.sampled_from([32, 256]))
def test_inputs_are_rounded_to_a_254th_of_the_largest_of_their_block(seed: int, block: int) -> None:
    x = torch.randn(3, 2 * block, generator=torch.Generator().manual_seed(seed)) ** 3
    blocks, off = (values.unflatten(-1, (-1, block)) for values in (x, round_to_8_bits(x, block) - x))
    largest = blocks.abs().amax(-1)
    assert bool((off.abs().amax(-1) <= largest / 254 * 1.0001).all())
    assert len((round_to_8_bits(x, block)[0, :block] / largest[0, 0] * 127).round().unique()) <= 255


def test_a_copy_in_float32_says_the_same(result: tuple[Path, Path], tmp_path: Path) -> None:
    path = result[1] / "model.gguf"
    rewrite(path, tmp_path / "copy.gguf", in_float32)
    ours, copy = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "copy.gguf")
    assert ours.fields.keys() - {"general.file_type"} == copy.fields.keys()
    own = {"general.file_type", "GGUF.kv_count"}
    assert all(copy.fields[name].contents() == ours.fields[name].contents() for name in ours.fields.keys() - own)
    for mine, other in zip(ours.tensors, copy.tensors, strict=True):
        assert (mine.name, other.tensor_type.name) == (other.name, "F32")
        assert (gguf.dequantize(mine.data, mine.tensor_type) == other.data).all()


def test_llama_cpp_reads_text_as_the_tokenizer_does(result: tuple[Path, Path]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = llama_cpp.Llama(str(result[1] / "model.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(result[0])
    for text in ("while x < 10: assert 1", " two  spaces\n", "naïve 😀"):
        assert opened.tokenize(text.encode()) == tokenizer(text)["input_ids"]


def fields(folder: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


def test_the_file_says_what_the_configuration_says(result: tuple[Path, Path]) -> None:
    model, folder = result
    config, found = json.loads((model / "config.json").read_text()), fields(folder)
    arch = found["general.architecture"]
    assert found[f"{arch}.embedding_length"] == config["hidden_size"]
    assert found[f"{arch}.attention.head_count_kv"] == config["num_key_value_heads"]
    assert found[f"{arch}.attention.key_length"] == config.get("head_dim") or config["hidden_size"] // 4
    assert found[f"{arch}.context_length"] == (64 if config["model_type"] == "mistral" else 256)
    assert found["general.quantization_version"] == 2
    assert found["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    assert len(found["tokenizer.ggml.tokens"]) == config["vocab_size"]
    assert found["tokenizer.ggml.eos_token_id"] == 0
    if arch == "gemma3":
        assert found["gemma3.attention.sliding_window"] == 16
        assert found["gemma3.attention.sliding_window_pattern"] == [True, False]
    if config["model_type"] in ("mixtral", "qwen3_moe"):
        assert (found[f"{arch}.expert_count"], found[f"{arch}.expert_used_count"]) == (4, 2)


def character_tokenizer(prefix: bool) -> PreTrainedTokenizerFast:
    """A byte-pair encoding of characters with bytes to fall back on, as of Llama-2 or Gemma."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend("▁")] * prefix
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["▁while▁the▁whole▁width▁is▁white"] * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_of_characters_keeps_its_bytes_scores_and_first_space(prefix: bool, tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    character_tokenizer(prefix).save_pretrained(model)
    folder = run(recipe(model, tmp_path / "out"))
    found = fields(folder)
    tokens, scores = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"]
    types = [gguf.TokenType(kind).name for kind in found["tokenizer.ggml.token_type"]]
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] == prefix
    assert types[:3] == ["CONTROL"] * 3
    assert set(types[3:259]) == {"BYTE"}
    assert types[-1] == "UNUSED"
    merges = [tuple(pair) for pair in json.loads((model / "tokenizer.json").read_text())["model"]["merges"]]
    made = ["".join(pair) for pair in merges]
    assert [scores[tokens.index(text)] for text in made] == [-made.index(text) for text in made]
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = llama_cpp.Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
    for text in ("while the width", "  is é 😀"):
        assert opened.tokenize(text.encode(), add_bos=False) == AutoTokenizer.from_pretrained(model)(text)["input_ids"]


def unknown_pre_tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("family", "changes", "damage", "reason"),
    [
        ("gpt_neox", {}, None, "cannot write GGUF files of model type 'gpt_neox'. Known: llama, mistral, mixtral"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            None,
            "cannot write rotary embeddings of type 'yarn'",
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
    asked = recipe(model, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dashq.model.decoder.Model._read", None)  # whoever reads a weight fails otherwise
        with pytest.raises(PlanError, match=reason):
            run(asked)
    assert not (tmp_path / "out").exists()
    outcome = call("plan", tmp_path / "out.yaml")
    assert outcome.code == 2
    assert reason.split(" is not known")[0] in " ".join(outcome.errors.split())


def test_a_pre_tokenizer_can_be_given(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    unknown_pre_tokenizer(model)
    folder = run(recipe(model, tmp_path / "out", serializer=FORMAT | {"pre_tokenizer": "falcon"}))
    assert fields(folder)["tokenizer.ggml.pre"] == "falcon"


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


def test_experts_can_stay_as_they_are(tmp_path: Path) -> None:
    model = pico_model("mixtral", tmp_path / "model", torch.float16, **SIZES)
    folder = run(recipe(model, tmp_path / "out", overrides=[{"match": ".*experts.*", "skip": True}]))
    experts = AutoModelForCausalLM.from_pretrained(model).model.layers[1].mlp.experts
    opened: Any = open_network(folder, torch.float16)
    assert opened.model.layers[1].mlp.experts.gate_up_proj.equal(experts.gate_up_proj)
    assert opened.model.layers[1].mlp.experts.down_proj.equal(experts.down_proj)


def test_a_tensor_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    folder = run(recipe(model, tmp_path / "out"))
    path = folder / "model.gguf"
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_norm", b"blk.1.atom_norm"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, the first is model.layers.1.input_layernorm.weight"):
        open_network(folder, torch.float32)


def test_a_failure_while_the_file_is_written_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full_disk)
        with pytest.raises(OSError, match="disk is full"):
            run(recipe(model, tmp_path / "out"))
    assert not (tmp_path / "out" / "model.gguf").exists()
    with pytest.raises(CheckpointError, match="is no finished result"):
        open_checkpoint(tmp_path / "out")
    folder = run(recipe(model, tmp_path / "out"))
    assert all(check.passed for check in verify(folder, "gguf"))
    assert not list(folder.glob("*.unfinished"))


def full_disk(writer: gguf.GGUFWriter) -> None:
    raise OSError("disk is full")


@pytest.mark.parametrize("label", ["Q2_K", "Q3_K", "Q4_K", "Q4_1", "Q5_1"])
def test_the_gguf_package_dequantizes_the_blocks_bit_by_bit(label: str, results: FormatResults) -> None:
    assert all(check.passed for check in verify(results[label], "gguf"))
    reader = gguf.GGUFReader(results[label] / "model.gguf")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if tensor.name.endswith("ffn_down.weight")}
    assert kinds == {label}
