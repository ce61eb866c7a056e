"""Whatever goes wrong while a model is opened is one line that names the file and the cause."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from broken_models import is_untouched, refusal
from commands import call
from dashq import CheckpointError
from dashq.errors import LONGEST_CAUSE, refusing
from dashq.quantizing.opening import open_model
from recipes import build_recipe, small_recipe, write_recipe


def configure(model: Path, **entries: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize(
    "content",
    [
        b"null",
        b"7",
        b"[]",
        b'"llama"',
        b"\xff\xfe{}",
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"{}",
    ],
    ids=["null", "number", "list", "string", "no UTF-8", "empty", "lists", "objects", "no entries"],
)
def test_a_configuration_that_is_no_object_is_refused(content: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(content)
    message = refusal(model)
    assert message.startswith(f"{model} holds no readable config.json: ")
    assert "\n" not in message
    assert is_untouched(model.with_name("out"))


def test_a_folder_in_the_place_of_the_configuration_is_refused(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    assert "Is a directory" in refusal(model)


@pytest.mark.parametrize(
    "entries",
    [
        {"num_attention_heads": 0},
        {"hidden_size": 10**12},
        {"hidden_size": -1},
        {"hidden_size": "wide"},
        {"intermediate_size": None},
        {"vocab_size": 10**30},
        {"num_key_value_heads": 0},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -5},
        {"num_hidden_layers": 10**9},
        {"dtype": "int8"},
        {"dtype": "no_type"},
        {"hidden_act": "no_such"},
        {"rope_parameters": {"rope_type": "no_such"}},
        {"rope_parameters": 7},
    ],
    ids=str,
)
def test_absurd_entries_are_refused_in_one_line(entries: dict[str, Any], model: Path) -> None:
    configure(model, **entries)
    message = refusal(model)
    assert message.startswith(str(model))
    assert "\n" not in message
    assert len(message) < LONGEST_CAUSE + len(str(model)) + 200
    assert is_untouched(model.with_name("out"))


def test_more_blocks_than_tensors_are_refused_before_any_is_built(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(model, num_hidden_layers=100_000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", None)
    assert "says 100000 decoder blocks, where the files hold 29 tensors in all" in refusal(model)


@pytest.mark.parametrize(
    "error", [ImportError, AttributeError, ZeroDivisionError, RecursionError, MemoryError, KeyError]
)
@pytest.mark.parametrize(
    ("kind", "call", "words"),
    [
        (AutoConfig, "from_pretrained", "holds no readable config.json"),
        (AutoModelForCausalLM, "from_config", "is no causal language model that transformers can build"),
        (AutoTokenizer, "from_pretrained", "holds no readable tokenizer"),
    ],
)
def test_whatever_transformers_raises_is_one_line(
    error: type[Exception], kind: type, call: str, words: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error("one line\n  and another")

    monkeypatch.setattr(kind, call, fail)
    message = refusal(model)
    assert message.startswith(f"{model} {words}: ")
    assert "one line" in message
    assert "\n" not in message.replace("\\n", "")
    assert is_untouched(model.with_name("out"))


def test_a_long_cause_is_cut_and_an_error_without_words_is_named() -> None:
    with pytest.raises(CheckpointError) as error, refusing("no"):
        raise ValueError("far " * 10_000)
    assert len(str(error.value)) < LONGEST_CAUSE + 20
    with pytest.raises(CheckpointError, match=r"^no: MemoryError$"), refusing("no"):
        raise MemoryError
    with pytest.raises(CheckpointError, match=r"^as it was$"), refusing("no"):
        raise CheckpointError("as it was")


def test_an_adapter_alone_is_to_be_merged_first(model: Path) -> None:
    (model / "config.json").unlink()
    (model / "adapter_config.json").write_text("{}")
    message = refusal(model)
    assert message.startswith(f"{model} holds adapter_config.json and no config.json: an adapter without its model")
    assert "merge_and_unload" in message


def test_an_adapter_beside_a_model_is_named(model: Path, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    (sentence,) = open_model(build_recipe(model, tmp_path / "out")).warnings
    assert sentence.startswith("adapter_config.json lies beside the model: its adapter is not applied")
    recipe = write_recipe(tmp_path / "recipe.yaml", small_recipe(model, tmp_path / "out"))
    assert "its adapter is not applied" in " ".join(call("plan", recipe).output.split())
