"""More tokens than a model can take are refused before a weight is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from commands import call
from dashq.errors import TextError
from dashq.model import source
from dashq.model.capacity import check_length, check_tokens, positions_of, usual_length
from pico import FAMILIES, SMALL, pico_model, pico_tokenizer
from recipes import TEXT, build_recipe, small_recipe, write_recipe

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "changes", "positions"),
    [
        ("gpt2", {}, 256),
        ("opt", {}, 256),
        ("llama", {}, 256),
        ("mistral", {"sliding_window": 16}, 256),
        ("bloom", {"max_position_embeddings": None}, None),
        ("mamba2", {"max_position_embeddings": None}, None),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 512),
        ("qwen2", {"rope_parameters": YARN | {"original_max_position_embeddings": 256}}, 1024),
        ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}, 256),
    ],
)
def test_positions_are_those_that_the_configuration_reaches(
    family: str, changes: dict[str, Any], positions: int | None
) -> None:
    name, own = FAMILIES[family]
    config = getattr(transformers, name)(**(SMALL | own | changes))
    assert positions_of(config) == positions
    check_length(positions or 10**6, config, "tokens")
    if positions:
        wrong, right = positions + 1, positions
        with pytest.raises(
            TextError, match=f"tokens {wrong} is more than the {right} positions of the model: lower it to {right}"
        ):
            check_length(wrong, config, "tokens")


def test_the_usual_length_is_one_that_every_model_can_take() -> None:
    short, long, endless = (
        transformers.LlamaConfig(max_position_embeddings=256),
        transformers.LlamaConfig(max_position_embeddings=4096),
        transformers.Mamba2Config(),
    )
    assert usual_length(2048, [long, endless]) == 2048
    assert usual_length(2048, [long, short, endless]) == 256
    assert usual_length(2048, []) == 2048


def test_a_token_beyond_the_embeddings_is_named() -> None:
    sizes: dict[str, Any] = dict(SMALL)
    config, tokenizer = transformers.LlamaConfig(**sizes), pico_tokenizer()
    check_tokens(torch.tensor([[0, sizes["vocab_size"] - 1]]), config, tokenizer)
    tokenizer.add_tokens([f"<mark {number}>" for number in range(40)])
    wide = tokenizer("<mark 39>", return_tensors="pt")["input_ids"]
    with pytest.raises(TextError, match=r"'<mark 39>' of number 339, .* end at 319: .*resize_token_embeddings\(340\)"):
        check_tokens(wide, config, tokenizer)


@pytest.fixture
def _no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        pytest.fail("a weight is read")

    monkeypatch.setattr(source.Shards, "lazy", fail)
    monkeypatch.setattr("dashq.measuring.evaluate.load_model", fail)


@pytest.mark.usefixtures("_no_weight_is_read")
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_too_long_samples_are_refused_by_every_command(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pico_model(family, Path("model"))
    calibration = TEXT | {"sequence_length": 257}
    write_recipe(Path("r.yaml"), small_recipe(Path("model"), Path("out"), calibration=calibration))
    for command in ("plan", "run", "analyze"):
        outcome = call(command, "r.yaml")
        assert outcome.code == 2
        message = "calibration.sequence_length 257 is more than the 256 positions of the model: lower it to 256"
        assert outcome.errors == f"dashq: {message}\n"
    assert not Path("out").exists()
    for arguments in (["--context", "257"], ["--context", "9", "--prompt", "x" * 250]):
        outcome = call("eval", "model", "--windows", "1", *arguments)
        assert outcome.code == 2
        assert "is more than the 256 positions" in outcome.errors


@pytest.mark.usefixtures("_no_weight_is_read")
def test_tokens_beyond_the_embeddings_are_refused_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pico_model("llama", Path("model"))
    tokenizer = pico_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|mark_{number}|>" for number in range(40)]})
    tokenizer.save_pretrained("model")
    Path("marks.txt").write_text("a <|mark_39|> b " * 99)
    recipe = small_recipe(Path("model"), Path("out"), calibration=TEXT | {"dataset": "marks.txt"})
    write_recipe(Path("r.yaml"), recipe)
    for arguments in (
        ["plan", "r.yaml"],
        ["run", "r.yaml"],
        ["analyze", "r.yaml"],
        ["eval", "model", "--text", "marks.txt", "--context", "64"],
        ["eval", "model", "--prompt", "<|mark_39|>user", "--context", "64"],
    ):
        outcome = call(*arguments)
        assert outcome.code == 2
        assert "dashq: the text holds the token '<|mark_39|>' of number 339" in outcome.errors
    assert not list(Path("out").glob("*"))


def test_other_text_of_the_same_tokenizer_is_taken(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model")
    tokenizer = pico_tokenizer()
    tokenizer.add_tokens([f"<|mark_{number}|>" for number in range(40)])
    tokenizer.save_pretrained(model)
    write_recipe(tmp_path / "r.yaml", small_recipe(model, tmp_path / "out"))
    assert call("plan", tmp_path / "r.yaml").code == 0
    assert build_recipe(model, tmp_path / "out").calibration.beginning == "auto"
