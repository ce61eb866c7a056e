"""GGUF files hold the tokenizer: llama.cpp reads text as it does."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dashq import run
from gguf_results import FORMAT, SIZES, fields, recipe, unknown_pre_tokenizer
from pico import pico_model


def test_llama_cpp_reads_text_as_the_tokenizer_does(result: tuple[Path, Path]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = llama_cpp.Llama(str(result[1] / "model.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(result[0])
    for text in ("while x < 10: assert 1", " two  spaces\n", "naïve 😀"):
        assert opened.tokenize(text.encode()) == tokenizer(text)["input_ids"]


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
    entries = fields(folder)
    tokens, scores = entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.scores"]
    types = [gguf.TokenType(kind).name for kind in entries["tokenizer.ggml.token_type"]]
    assert entries["tokenizer.ggml.model"] == "llama"
    assert entries["tokenizer.ggml.add_space_prefix"] == prefix
    assert types[:3] == ["CONTROL"] * 3
    assert set(types[3:259]) == {"BYTE"}
    assert types[-1] == "UNUSED"
    merges = [tuple(pair) for pair in json.loads((model / "tokenizer.json").read_text())["model"]["merges"]]
    merged = ["".join(pair) for pair in merges]
    assert [scores[tokens.index(text)] for text in merged] == [-merged.index(text) for text in merged]
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = llama_cpp.Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
    for text in ("while the width", "  is é 😀"):
        assert opened.tokenize(text.encode(), add_bos=False) == AutoTokenizer.from_pretrained(model)(text)["input_ids"]


def test_a_pre_tokenizer_can_be_given(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    unknown_pre_tokenizer(model)
    folder = run(recipe(model, tmp_path / "out", serializer=FORMAT | {"pre_tokenizer": "falcon"}))
    assert fields(folder)["tokenizer.ggml.pre"] == "falcon"
