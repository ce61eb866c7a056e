"""Models are read one block at a time; what cannot be quantized is refused by name, before anything is written."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from broken_models import DOWN, NORM, change, is_untouched, refusal
from dashq import CheckpointError, run
from dashq.model.decoder import Block
from dashq.quantizing.opening import open_model
from dashq.results.checkpoint import open_checkpoint, open_network
from dashq.results.verify import verify
from pico import EVEN, WIDE, pico_model
from recipes import build_recipe, mixture_recipe, small_scheme


@pytest.mark.parametrize("backwards", [False, True])
def test_the_walk_has_one_block_in_memory_even_where_all_are_kept(
    backwards: bool, whole_model: Path, tmp_path: Path
) -> None:
    model = open_model(build_recipe(whole_model, tmp_path / "out"))
    blocks: list[Block] = []
    tensors: list[weakref.ref[Tensor]] = []
    for block in model.walk(backwards):
        assert not any(reference() is not None for reference in tensors)
        assert not any(parameter.is_meta for parameter in block.module.parameters())
        assert all(parameter.is_meta for other in blocks for parameter in other.module.parameters())
        blocks.append(block)
        tensors.extend(map(weakref.ref, block.tensors.values()))
    order = range(len(model.blocks))[:: -1 if backwards else 1]
    assert [(block.index, block.name) for block in blocks] == [(index, model.blocks[index]) for index in order]
    assert len(tensors) > len(blocks)


@pytest.mark.parametrize("name", [DOWN, NORM], ids=["in a block", "outside the blocks"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_names_its_tensor(name: str, value: float, model: Path) -> None:
    change(model, name, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    assert f"{model}: the tensor {name} holds NaN or infinite values" in refusal(model)


def write_head(model: Path, value: float) -> Path:
    """Beside tied embeddings a head of its own, as large as them and `value` times their values."""
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def is_tied(folder: Path) -> bool:
    return bool(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])


@pytest.mark.parametrize(
    ("serializer", "bits", "solver"),
    [("dashq", 8, "rtn"), ("mlx", 8, "rtn"), ("compressed-tensors", 8, "rtn"), ("gptq", 8, "rtn"), ("gguf", 5, "rtn")],
)
def test_a_head_of_its_own_is_kept_where_the_configuration_ties_it(
    serializer: str, bits: int, solver: str, tmp_path: Path
) -> None:
    model = write_head(pico_model("llama", tmp_path / "model", torch.float16, **WIDE), -3)
    assert is_tied(model)
    scheme = small_scheme(32, bits=bits, solver=solver)
    out = run(build_recipe(model, tmp_path / "out", scheme=scheme, serializer=serializer))
    head = load_file(model / "model.safetensors")["lm_head.weight"]
    assert open_checkpoint(out).tensors["lm_head.weight"][...].equal(head)
    assert not is_tied(out)
    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(tokens).logits
        logits = open_network(out, torch.float32)(tokens).logits
    assert (logits - expected).norm() < 0.5 * expected.norm()  # with the embeddings as head it is 1.3


def test_a_head_of_its_own_is_kept_where_shards_hold_it(tmp_path: Path) -> None:
    whole = write_head(pico_model("llama", tmp_path / "whole"), -3)
    tensors = load_file(whole / "model.safetensors")
    model = shutil.copytree(whole, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    shards = {"a.safetensors": ["lm_head.weight"], "b.safetensors": sorted(tensors.keys() - {"lm_head.weight"})}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, model / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    first, second = (run(build_recipe(folder, tmp_path / f"out-{folder.name}")) for folder in (whole, model))
    assert not is_tied(second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_copy_of_the_embeddings_as_head_stays_tied(tmp_path: Path) -> None:
    plain = pico_model("llama", tmp_path / "model")
    twice = write_head(shutil.copytree(plain, tmp_path / "twice"), 1)
    first, second = (run(build_recipe(model, tmp_path / f"out-{model.name}")) for model in (plain, twice))
    assert is_tied(second)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_a_tensor_of_another_shape_names_both_shapes(model: Path) -> None:
    change(model, DOWN, lambda tensors: tensors.update({DOWN: tensors[DOWN][:, :64].clone()}))
    needed = "where the model's configuration needs [48, 80]"
    assert refusal(model) == f"{model}: tensor {DOWN} has shape [48, 64] {needed}"
    assert is_untouched(model.with_name("out"))


def test_a_missing_tensor_is_named(model: Path) -> None:
    change(model, DOWN, lambda tensors: tensors.pop(DOWN))
    assert refusal(model) == f"{model} lacks 1 tensors, the first is {DOWN}"
    assert is_untouched(model.with_name("out"))


def without_head(model: Path, **config: Any) -> Path:
    """The files of a model that was saved without its head: names without a prefix, as models of embeddings have."""
    tensors = load_file(model / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(bare, model / "model.safetensors", metadata={"format": "pt"})
    entries = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(entries | config))
    return model


def test_a_model_without_a_head_is_quantized_and_opens_without_one(tmp_path: Path) -> None:
    plain = pico_model("qwen3", tmp_path / "plain", **EVEN, tie_word_embeddings=True)
    model = without_head(shutil.copytree(plain, tmp_path / "model"), architectures=["Qwen3Model"])
    scheme = small_scheme(bits=8, solver="rtn")
    out, expected = (run(build_recipe(m, tmp_path / f"out-{m.name}", scheme=scheme)) for m in (model, plain))
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        original = AutoModel.from_pretrained(model)(ids).last_hidden_state
        opened = AutoModel.from_pretrained(out)(ids).last_hidden_state
        whole = AutoModelForCausalLM.from_pretrained(out).model(ids).last_hidden_state
    assert opened.equal(whole)
    assert float((opened - original).norm() / original.norm()) < 0.02


MODULES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": 48,
        "pooling_mode_lasttoken": True,
        "pooling_mode_mean_tokens": False,
    },
    "config_sentence_transformers.json": {"prompts": {"query": "Instruct: "}, "similarity_fn_name": "cosine"},
    "sentence_bert_config.json": {"max_seq_length": 64},
}


@pytest.mark.parametrize("architecture", ["Qwen3Model", "Qwen3ForCausalLM"])
def test_an_embedding_model_opens_with_sentence_transformers(architecture: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    model = without_head(
        pico_model("qwen3", tmp_path / "model", tie_word_embeddings=True), architectures=[architecture]
    )
    settings = json.loads((model / "tokenizer_config.json").read_text())
    for name, content in {**MODULES, "tokenizer_config.json": settings | {"pad_token": "</s>"}}.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(json.dumps(content))
    out = run(build_recipe(model, tmp_path / "out", dtype="float32", scheme=small_scheme(bits=8, solver="rtn")))
    dequantized = Path(shutil.copytree(model, tmp_path / "dequantized"))
    checkpoint = open_checkpoint(out)
    tensors = load_file(model / "model.safetensors")
    for name in checkpoint.layers:
        tensors[f"{name.removeprefix('model.')}.weight"] = checkpoint.quantized(name).dequantize().contiguous()
    save_file(tensors, dequantized / "model.safetensors", metadata={"format": "pt"})
    opened = [library.SentenceTransformer(str(folder)) for folder in (out, dequantized, model)]
    assert opened[0].max_seq_length == 64
    for prompt in (None, "query"):
        texts = ["while True: assert x", "a much longer sentence about embeddings, and what they are for", "x"]
        own, plain, original = (each.encode(texts, prompt_name=prompt, convert_to_tensor=True) for each in opened)
        assert torch.allclose(own, plain, atol=1e-6)
        assert bool(((own * original).sum(-1) > 0.99).all())
        assert not torch.allclose(own, original, atol=1e-3)


def test_a_model_that_lost_its_head_is_refused_with_a_way_out(tmp_path: Path) -> None:
    model = pico_model("llama-untied-biased", tmp_path / "model")
    message = refusal(without_head(model))
    assert message.startswith(f"{model} holds no head that predicts tokens (lm_head.weight)")
    assert is_untouched(tmp_path / "out")
    without_head(model, tie_word_embeddings=True)
    assert (run(build_recipe(model, tmp_path / "out")) / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_matrices_without_weights_are_no_layers(tmp_path: Path) -> None:
    model = pico_model("deepseek_v3", tmp_path / "model", n_shared_experts=0)
    result = run(mixture_recipe(model, tmp_path / "result"))
    layers = open_checkpoint(result).layers
    assert layers
    assert not [name for name in layers if "shared_experts" in name]
    assert all(check.passed for check in verify(result))


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no_such_model"}', "[]"])
def test_a_model_without_a_readable_configuration_is_refused(content: str | None, model: Path) -> None:
    (model / "config.json").unlink()
    if content is not None:
        (model / "config.json").write_text(content)
    assert f"{model} holds no readable config.json" in refusal(model)
    assert is_untouched(model.with_name("out"))


def test_a_model_of_another_kind_is_refused(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "clip"}')
    assert f"{model} is no causal language model" in refusal(model)


def test_a_quantized_model_is_not_quantized_again(whole_model: Path, tmp_path: Path) -> None:
    out = run(build_recipe(whole_model, tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"is already quantized \(dashq\); dashq needs the original weights"):
        run(build_recipe(out, tmp_path / "again"))
    assert is_untouched(tmp_path / "again")


@pytest.mark.parametrize("content", [None, "{"], ids=["none", "garbage"])
def test_a_model_without_a_readable_tokenizer_is_refused(content: str | None, model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    if content is not None:
        (model / "tokenizer.json").write_text(content)
    assert f"{model} holds no readable tokenizer" in refusal(model)
    assert is_untouched(model.with_name("out"))
