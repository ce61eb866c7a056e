"""A process answers every line of messages with one line: their text, or why there is none."""

import json
import subprocess
import sys
from typing import Any

import pytest

from dashq.calibration.chat_process import serve

ADDED = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
DEEP = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


def lines(*documents: Any, **changes: Any) -> list[str]:
    """The questions: settings, and documents."""
    settings = {
        "template": TEMPLATE,
        "options": {"eos_token": "</s>", "add_generation_prompt": False},
        "memory": None,
        "letters": 100,
    }
    return [f"{json.dumps(content)}\n" for content in (settings | changes, *documents)]


def answers(*documents: Any, **changes: Any) -> list[dict[str, str]]:
    return list(serve(iter(lines(*documents, **changes))))


def message(content: Any, **entries: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **entries}


def test_it_says_first_that_it_is_ready_and_then_answers_in_order() -> None:
    assert answers() == [{"text": ""}]
    both = answers([message("a\nb")], [message("é"), message("c")])
    assert both == [{"text": ""}, {"text": "<user>a\nb</s>"}, {"text": "<user>é</s><user>c</s>"}]


def test_what_precedes_the_next_answer_is_added_where_that_is_asked() -> None:
    template = TEMPLATE + "{% if add_generation_prompt %}<assistant>{% endif %}"
    options = {"eos_token": "</s>", "add_generation_prompt": True}
    assert answers([message("a")], template=template, options=options)[1] == {"text": "<user>a</s><assistant>"}


def test_entries_without_a_value_are_as_if_they_were_not_there() -> None:
    template = "{% for m in messages %}{{ 'name' in m }}{% endfor %}"
    assert answers([message("a", name=None), message("a", name="n")], template=template)[1] == {"text": "FalseTrue"}


def test_a_template_that_fails_is_told_in_short_and_the_next_document_answered() -> None:
    template = "{% if messages[0].content == 'x' %}{{ raise_exception('no ' * 1000) }}{% endif %}fine"
    failed, fine = answers([message("x")], [message("a")], template=template)[1:]
    assert failed["error"].startswith("TemplateError: no no")
    assert len(failed["error"]) == 1000
    assert fine == {"text": "fine"}


@pytest.mark.parametrize(
    ("template", "content", "reason"),
    [
        (ADDED, [{"type": "text", "text": "Why?"}], 'TypeError: can only concatenate str (not "list") to str'),
        (ADDED, None, "UndefinedError: 'dict object' has no attribute 'content'"),
        ("{{ raise_exception('No assistant!') }}", "Why?", "TemplateError: No assistant!"),
        ("{{ 1 / 0 }}", "Why?", "ZeroDivisionError: division by zero"),
        ("{% if %}", "Why?", "TemplateSyntaxError: Expected an expression, got 'end of statement block'"),
        (DEEP, "Why?", "RecursionError: "),
        ("{{ range(10 ** 6) }}", "Why?", "OverflowError: Range too big"),
        ("{{ 'a' * 101 }}", "Why?", "it makes more than 100 letters"),
    ],
)
def test_a_template_that_fails_is_told(template: str, content: object, reason: str) -> None:
    failed = answers([message(content)], [message(content)], template=template)[1:]
    assert failed[0]["error"].startswith(reason)
    assert failed[0] == failed[1]


def test_a_text_may_have_so_many_letters_and_no_more() -> None:
    assert answers([message("Hello")], letters=15)[1] == {"text": "<user>Hello</s>"}
    assert answers([message("Hello")], letters=14)[1] == {"error": "it makes more than 14 letters"}


def test_in_a_process_of_its_own_nothing_else_stands_between_the_answers() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "dashq.calibration.chat_process"],
        input="".join(lines([message("Hi")])),
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line) for line in process.stdout.splitlines()] == [{"text": ""}, {"text": "<user>Hi</s>"}]
