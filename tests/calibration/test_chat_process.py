"""The process of chat templates answers every document with its text, or with the reason why there is none."""

import json
from typing import Any

import pytest

from dashq.calibration.chat_process import serve

ADDED = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
DEEP = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}"


@pytest.mark.parametrize(
    ("template", "content", "message"),
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
def test_a_template_that_fails_is_told(template: str, content: object, message: str) -> None:
    settings: dict[str, Any] = {"template": template, "special_tokens": {}, "memory": None, "letters": 100}
    questions: list[Any] = [settings, [{"role": "user", "content": content}], [{"role": "user", "content": content}]]
    answers: list[str] = []
    serve(map(json.dumps, questions), answers.append)
    ready, first, second = map(json.loads, answers)
    assert ready == {"text": ""}
    assert first["error"].startswith(message)
    assert first == second
