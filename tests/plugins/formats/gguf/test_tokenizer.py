"""GGUF files hold the tokenizer: llama.cpp reads text as it does."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoTokenizer

from dashq import PlanError, run
from dashq.results.verify import verify
from gguf_results import FORMAT, SIZES, fields, recipe, unknown_pre_tokenizer
from pico import beginning_tokenizer, character_tokenizer, pico_model, pico_tokenizer

CUT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"  # what may follow a word


def test_llama_cpp_reads_text_as_the_tokenizer_does(result: tuple[Path, Path]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = llama_cpp.Llama(str(result[1] / "model.gguf"), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(result[0])
    for text in ("while x < 10: assert 1", " two  spaces\n", "naïve 😀"):
        assert opened.tokenize(text.encode()) == tokenizer(text)["input_ids"]


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


@pytest.mark.parametrize("around", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_the_file_says_which_tokens_begin_and_end_a_text(
    around: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    tokenizer = beginning_tokenizer()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, pair="$A <s> $B", special_tokens=ids
    )
    tokenizer.save_pretrained(model)
    folder = run(recipe(model, tmp_path / "out"))
    entries = fields(folder)
    adds = {kind: entries[f"tokenizer.ggml.add_{kind}_token"] for kind in ("bos", "eos")}
    assert adds == {"bos": "<s>" in around, "eos": "</s>" in around}
    assert not caplog.messages  # the package knows no such pairs, and texts alone are written
    assert all(check.passed for check in verify(folder))
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = llama_cpp.Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
    assert opened.tokenize(b"while x") == AutoTokenizer.from_pretrained(model)("while x")["input_ids"]


def test_a_file_that_says_otherwise_is_told_by_verify(result: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(result[1], tmp_path / "copy"))
    beginning_tokenizer("<s>").save_pretrained(folder)
    failed = [check for check in verify(folder) if not check.passed and check.kind == "settings"]
    assert "model.gguf tokenizer.ggml.add_bos_token" in [check.name for check in failed]


def test_tokens_that_llama_cpp_cannot_add_are_refused(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    beginning_tokenizer("<mask>", "<s>").save_pretrained(model)
    with pytest.raises(PlanError, match=r"no token but bos .* this tokenizer \['<mask>', '<s>'\]"):
        run(recipe(model, tmp_path / "out"))


def check_cut(pattern: str, name: str, text: str, folder: Path) -> None:
    """The file names how text is cut by this pattern, and llama.cpp cuts two texts as the tokenizer does."""
    model = pico_model("llama", folder / "model", torch.float16, **SIZES)
    tokenizer = pico_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.save_pretrained(model)
    result = run(recipe(model, folder / "out"))
    assert fields(result)["tokenizer.ggml.pre"] == name
    llama_cpp = pytest.importorskip("llama_cpp")
    opened = llama_cpp.Llama(str(result / "model.gguf"), vocab_only=True, verbose=False)
    for own in (text, "the  value:\n\n if it's a/b\n"):
        assert opened.tokenize(own.encode(), add_bos=False) == AutoTokenizer.from_pretrained(model)(own)["input_ids"]


@pytest.mark.parametrize(("suffix", "digits", "name"), [(CUT, "{1,3}", "gpt-4o"), ("", "", "tekken")])
def test_words_that_end_before_a_capital_are_cut_as_the_tokenizer_does(
    suffix: str, digits: str, name: str, tmp_path: Path
) -> None:
    lower, upper = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
    words = [rf"[^\r\n\p{{L}}\p{{N}}]?[{upper}]{a}[{lower}]{b}{suffix}" for a, b in (("*", "+"), ("+", "*"))]
    pattern = "|".join([*words, rf"\p{{N}}{digits}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+|\s+(?!\S)|\s+"])
    check_cut(pattern, name, "whileWhile isn't 12345 HELLOworld", tmp_path)


@pytest.mark.parametrize(("marks", "name"), [("", "qwen2"), (r"\p{M}", "qwen35")])
def test_accents_belong_to_the_letters_before_them_where_the_tokenizer_says_so(
    marks: str, name: str, tmp_path: Path
) -> None:
    word = rf"[\p{{L}}{marks}]+" if marks else r"\p{L}+"
    pattern = "|".join(
        [
            CUT.removesuffix("?"),
            rf"[^\r\n\p{{L}}\p{{N}}]?{word}",
            rf"\p{{N}}| ?[^\s\p{{L}}{marks}\p{{N}}]+[\r\n]*",
            r"\s*[\r\n]+|\s+(?!\S)|\s+",
        ]
    )
    check_cut(pattern, name, "whilee\u0301while isn't 12345", tmp_path)


def test_a_pre_tokenizer_can_be_given(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    unknown_pre_tokenizer(model)
    folder = run(recipe(model, tmp_path / "out", serializer=FORMAT | {"pre_tokenizer": "falcon"}))
    assert fields(folder)["tokenizer.ggml.pre"] == "falcon"
