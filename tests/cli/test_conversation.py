"""A conversation keeps what was said, as far as the model has room, and an answer that is stopped counts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import TextError
from dashq.measuring.evaluate import Loaded, load_model
from dashq_cli import conversation
from dashq_cli.conversation import Conversation, Drawing


@pytest.fixture(scope="module")
def loaded(model: Path) -> Loaded:
    return load_model(str(model), dtype="float32")


def expected(loaded: Loaded, messages: list[dict[str, str]], tokens: int) -> str:
    """The likeliest answer to these messages."""
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([loaded.tokenizer.encode(str(text), add_special_tokens=False)])
    with torch.inference_mode():
        output = loaded.network.generate(ids, max_new_tokens=tokens, do_sample=False)
    return str(loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_answers_follow_from_all_that_was_said(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Conversation(loaded, Drawing(8, 0), system="be brief")
    said = [{"role": "system", "content": "be brief"}]
    for message in ("while", "assert"):
        talk.answer(message)
        answer = expected(loaded, [*said, user(message)], 8)
        assert capsys.readouterr().out == f"{answer}\n"
        said += [user(message), assistant(answer)]


def test_the_oldest_messages_are_forgotten_where_there_is_no_room(
    loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Conversation(loaded, Drawing(4, 0))
    for word in ("while ", "assert "):  # both messages together are more than 256 tokens
        talk.answer(word * (150 // len(loaded.tokenizer.encode(word, add_special_tokens=False))))
    capsys.readouterr()
    with pytest.raises(TextError, match="leave no room for an answer in the model's 256"):
        talk.answer("x" * 300)
    talk.answer("if")
    assert capsys.readouterr().out == f"{expected(loaded, [user('if')], 4)}\n"


def test_an_answer_that_is_stopped_counts_as_far_as_it_went(
    loaded: Loaded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put: Any = conversation._Printed.put
    puts: list[object] = []

    def interrupted(self: conversation._Printed, value: object) -> None:
        puts.append(value)
        if len(puts) == 5:  # the prompt, and three tokens
            raise KeyboardInterrupt
        put(self, value)

    talk = Conversation(loaded, Drawing(8, 0))
    with monkeypatch.context() as patch:
        patch.setattr(conversation._Printed, "put", interrupted)
        talk.answer("while")
    begun = expected(loaded, [user("while")], 3)
    assert capsys.readouterr().out == f"{begun}\n"
    talk.answer("assert")
    said = [user("while"), assistant(begun), user("assert")]
    assert capsys.readouterr().out == f"{expected(loaded, said, 8)}\n"


@pytest.mark.parametrize(
    ("temperature", "sampling"), [(None, {}), (0.0, {"do_sample": False}), (0.7, {"do_sample": True})]
)
def test_the_temperature_decides_how_tokens_are_chosen(temperature: float | None, sampling: dict[str, bool]) -> None:
    assert sampling.items() <= Drawing(8, temperature).settings.items()
