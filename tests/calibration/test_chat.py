"""Messages become text through the tokenizer's chat template, within limits; what does not is named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from commands import call
from dashq.calibration import chat
from dashq.calibration.chat import chat_template, rendered
from dashq.calibration.tokens import draw, evaluation_windows
from dashq.errors import TextError
from dashq.recipe.recipe import Calibration
from pico import pico_tokenizer
from recipes import small_recipe, write_recipe
from texts import CHAT, source_of

TOKENIZER = pico_tokenizer()


@pytest.mark.parametrize(("document", "text"), [("Hi", "<user>Hi</s>"), (CHAT, "<user>Why?</s><pico>Because.</s>")])
def test_chat_goes_through_the_template(tmp_path: Path, document: object, text: str) -> None:
    ids = TOKENIZER.encode(text)
    calibration = Calibration(dataset=(source_of(tmp_path, document, chat=True),), samples=1, sequence_length=len(ids))
    assert draw(calibration, TOKENIZER).samples.tolist() == [ids]


def test_messages_are_rendered_as_the_tokenizer_does() -> None:
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}"
        "{% elif m.content %}{{ m.content[0].text }}{% else %}{{ m.tool_calls | tojson }}{% endif %}{{ eos_token }}"
        "{% endfor %}"
    )
    conversations: list[list[dict[str, Any]]] = [
        CHAT,
        [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}],
        [
            {"role": "user", "content": None, "tool_calls": [{"name": "f", "number": 0.1}]},
            {"role": "ü", "content": "é"},
        ],
    ]
    with chat_template(tokenizer) as render:
        assert [render(messages) for messages in conversations] == [
            tokenizer.apply_chat_template(messages, tokenize=False) for messages in conversations
        ]


def no_template(messages: list[dict[str, Any]]) -> str:
    pytest.fail("the template is asked")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([{"from": "human", "value": "Why?"}], 'message 1 of 1 has no role: {"from": "human"'),
        ([*CHAT, {"role": None, "content": "x"}], "message 3 of 3 has no role"),
        ([{"role": "user", "content": 5}], "the content of message 1 is no text: 5"),
        ([{"role": "user", "content": None}], "the content of message 1 is no text: null"),
        ([{"role": "user", "tool_calls": None}], "the content of message 1 is no text: null"),
        ([{"role": "user", "content": []}], "the content of message 1 is no text: []"),
        ([*CHAT, {"role": "user", "content": ["Why?"]}], 'the content of message 3 is no text: ["Why?"]'),
        (7, "holds no messages with role and content, nor plain text, but 7"),
        (None, "nor plain text, but null"),
        (["Why?"], "holds no messages with role and content"),
    ],
)
def test_a_document_that_is_no_chat_is_named(document: object, message: str) -> None:
    with pytest.raises(TextError, match=f"chats.jsonl, line 3.*{re.escape(message)}"):
        rendered(document, no_template, "chats.jsonl, line 3")


def test_parts_that_a_template_would_write_as_they_are_are_refused(tmp_path: Path) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "it's in parts"}]}]
    message = r"line 2: the chat template takes no parts, which message 1 has: \[{"
    with pytest.raises(TextError, match=message):
        evaluation_windows(source_of(tmp_path, "word " * 300, parts, chat=True), TOKENIZER, 32, limit=None)


@pytest.mark.parametrize("document", [7, None, {"role": "user", "content": "x"}, [{"role": "user", "content": 5}]])
def test_a_run_that_draws_a_broken_document_ends_in_one_line_that_names_it(
    document: object, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"text": content}) for content in (document, "word " * 3000)))
    recipe = small_recipe(model, tmp_path / "out")
    recipe["calibration"]["dataset"] = {"name": str(path), "chat": True}
    outcome = call("run", write_recipe(tmp_path / "recipe.yaml", recipe))
    assert outcome.code == 2
    assert outcome.errors.startswith(f"dashq: {path}, line 1")
    assert outcome.errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_list_of_messages_needs_to_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"line 1 holds no text in 'text' but \[.*; chat messages need chat: true"):
        evaluation_windows(source_of(tmp_path, CHAT), TOKENIZER, 32, limit=None)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = None
    message = "the tokenizer has no chat template, which `chat: true` asks for"
    with pytest.raises(TextError, match=message), chat_template(tokenizer):
        pass


def test_a_template_that_takes_too_much_memory_is_ended_and_the_document_named() -> None:
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = "{{ 'a' * 10 ** 10 }}"
    with (
        chat_template(tokenizer) as render,
        pytest.raises(TextError, match=r"a\.jsonl, line 7: the chat template failed: it takes more memory than it may"),
    ):
        rendered(CHAT, render, "a.jsonl, line 7")


def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = pico_tokenizer()
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(chat, "SECONDS", 0.1)
    with (
        chat_template(tokenizer) as render,
        pytest.raises(
            TextError, match=r"a\.json: the chat template takes more than \d+ seconds or 2,147,483,648 bytes"
        ),
    ):
        rendered(CHAT, render, "a.json")
