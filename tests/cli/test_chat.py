"""`dashq chat` answers one prompt, or each line of a pipe, whatever format a result is in."""

import io
import sys
from pathlib import Path

import pytest

from commands import Outcome, call
from format_results import FormatResults
from pico import pico_model, pico_tokenizer


def chat(*arguments: object, lines: str = "") -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(lines))
        return call("chat", *arguments, "--tokens", 6, "--dtype", "float32")


@pytest.mark.parametrize("label", ["dashq", "mlx", "gptq", "compressed-tensors", "dashq-packed-linear", "Q4_1"])
def test_results_of_every_format_answer(label: str, results: FormatResults) -> None:
    outcome = chat(results[label], "--prompt", "while", "--temperature", 0)
    assert outcome.code == 0, outcome
    assert outcome.output.endswith("\n")
    assert outcome.output.strip()


def test_each_line_of_a_pipe_is_a_message_until_exit(result: Path) -> None:
    outcome = chat(result, lines="while\n\nassert\nexit\nif\n")
    assert (outcome.code, outcome.errors) == (0, "")
    alone = chat(result, "--prompt", "while").output
    assert outcome.output.startswith(alone)
    assert chat(result, lines="while\n").output == alone  # the end of the pipe ends it too
    assert len(outcome.output) > len(alone)


def test_drawn_answers_are_the_same_with_the_same_seed(result: Path) -> None:
    drawn = [chat(result, "--prompt", "while", "--temperature", 5, "--seed", seed).output for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_model_without_a_template_goes_on_with_the_text(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "plain")
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = None
    for file in model.glob("chat_template*"):
        file.unlink()
    tokenizer.save_pretrained(model)
    outcome = chat(model, "--prompt", "while")
    assert outcome.code == 0
    assert outcome.errors == "note: this model has no chat template: it goes on with each text\n"
    refused = chat(model, "--prompt", "while", "--system", "be brief")
    assert (refused.code, refused.output) == (2, "")
    assert "--system needs a chat template, which this model does not have" in refused.errors


def test_a_message_that_is_too_long_ends_no_conversation(result: Path) -> None:
    outcome = chat(result, lines=f"{'while ' * 300}\nassert\n")
    assert outcome.code == 0
    assert "leave no room for an answer in the model's 256" in outcome.errors
    assert outcome.output == chat(result, "--prompt", "assert").output
