"""Chat templates, filled in by a process of its own: they are programs of strangers, and may run forever."""

import json
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

from transformers import PreTrainedTokenizerBase

from dashq.errors import TextError, one_line
from dashq.strict import shown

SECONDS = 10.0  # for one document
STARTING = 200.0  # seconds, to import transformers on a busy machine
MEMORY = 2**31  # bytes of address space, where the system can limit it
LETTERS = 2**26  # of one document's text

Render = Callable[[list[dict[str, Any]]], str]


@contextmanager
def chat_template(tokenizer: PreTrainedTokenizerBase, answering: bool = False) -> Generator[Render]:
    """A function that makes one text of a document's messages, for the duration of the `with` statement.

    With `answering`, the text ends with what precedes the next answer.
    Raises a `TextError` where the tokenizer has no template; the function does where the template fails, or takes more
    than `SECONDS`, `MEMORY` or `LETTERS`.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise TextError("the tokenizer has no chat template, which `chat: true` asks for") from error
    settings = {
        "template": template,
        "options": {**tokenizer.special_tokens_map, "add_generation_prompt": answering},
        "memory": MEMORY,
        "letters": LETTERS,
    }
    program = [sys.executable, "-P", str(Path(__file__).with_name("chat_process.py"))]
    process = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
    )
    assert process.stdin
    assert process.stdout
    try:
        _ask(process, settings, STARTING)
        yield lambda messages: _ask(process, messages, SECONDS)
    finally:
        process.kill()
        process.stdout.close()
        with suppress(BrokenPipeError):  # of a question that it did not live to read
            process.stdin.close()
        process.wait()


def rendered(document: object, render: Render, place: str) -> str:
    """The text of a document, a list of messages or what a user says; a `TextError` that names its place."""
    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise TextError(f"{place} holds no messages with role and content, nor plain text, but {shown(document)}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message.get("role"), str):
            raise TextError(f"{place}: message {number} of {len(messages)} has no role: {shown(message)}")
        if not _has_content(message):
            raise TextError(f"{place}: the content of message {number} is no text: {shown(message.get('content'))}")
    try:
        text = render(messages)
    except TextError as error:
        raise TextError(f"{place}: {error}") from error
    for number, message in enumerate(messages, 1):
        if isinstance(content := message.get("content"), list) and str(content) in text:
            raise TextError(f"{place}: the chat template takes no parts, which message {number} has: {shown(content)}")
    return text


def _has_content(message: Mapping[str, Any]) -> bool:
    """True for text, for parts that a template may take, and for none where the message holds something else."""
    content = message.get("content")
    if isinstance(content, list):
        return bool(content) and all(isinstance(part, dict) for part in content)
    others = [value for key, value in message.items() if key not in ("role", "content")]
    return isinstance(content, str) or (content is None and any(others))


def _ask(process: "subprocess.Popen[str]", question: object, seconds: float) -> str:
    """The process's answer to one line; a `TextError` with its reason, or where it gave none in time."""
    assert process.stdin
    assert process.stdout
    timer = Timer(seconds, process.kill)
    timer.start()
    try:
        process.stdin.write(json.dumps(question, default=str) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        timer.cancel()
    if not line:
        raise TextError(f"the chat template takes more than {SECONDS:.0f} seconds or {MEMORY:,} bytes of memory")
    answer = json.loads(line)
    if "error" in answer:
        raise TextError(f"the chat template failed: {one_line(answer['error'])[:300]}")
    return str(answer["text"])
