"""A Modelfile asks Ollama for the text that the model's own chat template makes, and ends answers where it does."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dashq import run
from dashq.calibration.chat import Render
from dashq.errors import TextError
from dashq_plugins.formats.gguf.modelfile import Turns, turns_of
from gguf_results import FORMAT, recipe
from pico import EVEN, beginning_tokenizer, pico_model

TURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
HEADERS = "{{ bos_token }}" + TURNS
USUAL_SYSTEM = "{% if messages[0].role != 'system' %}<|start|>system\n\nBe kind.<|end|>{% endif %}" + TURNS
IN_THE_USERS_TURN = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}"
    "[{{ m.role }}]{{ system if loop.first }}{{ m.content }}[/]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITHOUT_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}{{ raise_exception('no system') }}{% endif %}"
    "{% endfor %}"
)
THOUGHTS_AT_LAST = HEADERS.replace("<|start|>assistant\n\n{% endif", "<|start|>assistant\n\n<think>\n{% endif")
BRACES = HEADERS.replace("<|start|>", "{{ '{{' }}")
TEMPLATES = {
    "headers": HEADERS,
    "usual system": USUAL_SYSTEM,
    "in the user's turn": IN_THE_USERS_TURN,
    "thoughts at last": THOUGHTS_AT_LAST,
    "braces": BRACES,
}
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def renderer(template: str) -> Render:
    def render(messages: list[dict[str, Any]]) -> str:
        try:
            rendered = render_jinja_template(
                [messages], chat_template=template, bos_token="<s>", add_generation_prompt=True
            )
        except Exception as error:
            raise TextError(str(error)) from error
        return str(rendered[0][0])

    return render


def messages(roles: str) -> list[dict[str, str]]:
    return [{"role": ROLES[role], "content": f"text {number}"} for number, role in enumerate(roles)]


def turns(template: str) -> Turns:
    result = turns_of(renderer(template), "<s>")
    assert result
    return result


def in_go(template: str, conversation: Sequence[dict[str, str]]) -> str:
    """The template filled in as Go does: by a reading of its actions, which are the few that Modelfiles have."""
    body = template.removeprefix("{{ range $i, $m := .Messages }}").removesuffix("{{ end }}")
    actions = {
        "{{ if eq $i 0 }}": "{% if i == 0 %}",
        "{{ if eq (len (slice $.Messages $i)) 1 }}": "{% if i == count - 1 %}",
        "{{ else }}": "{% else %}",
        "{{ end }}": "{% endif %}",
        "{{ $m.Content }}": "{{ m.content }}",
        **{f'{{{{ if eq $m.Role "{role}" }}}}': f"{{% if m.role == '{role}' %}}" for role in ROLES.values()},
        **{f'{{{{ else if eq $m.Role "{role}" }}}}': f"{{% elif m.role == '{role}' %}}" for role in ROLES.values()},
    }
    for action, statement in actions.items():
        body = body.replace(action, statement)
    filled = jinja2.Environment(keep_trailing_newline=True).from_string(body)
    return "".join(filled.render(i=i, m=m, count=len(conversation)) for i, m in enumerate(conversation))


@pytest.mark.parametrize("roles", ["u", "su", "uau", "suau", "uauau"])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_ollama_is_told_the_text_that_the_template_makes(template: str, roles: str) -> None:
    conversation = messages(roles)
    expected = renderer(template)(conversation).removeprefix("<s>")
    assert turns(template).text(conversation) == expected
    assert in_go(turns(template).in_go(), conversation) == expected


def test_what_a_system_says_begins_the_users_turn_where_the_template_knows_no_system() -> None:
    without = turns(WITHOUT_SYSTEM)
    assert without.text(messages("uau")) == renderer(WITHOUT_SYSTEM)(messages("uau")).removeprefix("<s>")
    assert without.text(messages("su")) == "[INST] text 0\n\ntext 1 [/INST]"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        '{% for m in messages %}"""{{ m.content }}{% endfor %}',
    ],
    ids=["fails", "only the last", "counts turns", "quotes of a Modelfile"],
)
def test_a_template_that_treats_turns_differently_is_left_to_ollama(template: str) -> None:
    assert turns_of(renderer(template), "") is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico_model("llama", tmp_path_factory.mktemp("model") / "model", **EVEN)
    tokenizer = beginning_tokenizer("<s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = HEADERS
    tokenizer.save_pretrained(folder)
    settings = {"eos_token_id": [0, tokenizer.convert_tokens_to_ids("<s>")], "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_a_result_for_ollama_has_a_modelfile_that_is_replaced_with_it(model: Path, tmp_path: Path) -> None:
    run(recipe(model, tmp_path / "out", serializer=FORMAT | {"modelfile": True}))
    text = (tmp_path / "out" / "Modelfile").read_text()
    first, rest = text.split("TEMPLATE ")
    assert first == "FROM ./model.gguf\n"
    template, parameters = rest.rsplit('"""\n', 1)
    assert template == f'"""{turns(HEADERS).in_go()}'
    assert parameters.splitlines() == [
        'PARAMETER stop "</s>"',
        'PARAMETER stop "<s>"',
        'PARAMETER stop "<|end|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 0.9",
    ]
    assert "Modelfile" in json.loads((tmp_path / "out" / "report.json").read_text())["files"]
    run(recipe(model, tmp_path / "out"), overwrite=True)
    assert not (tmp_path / "out" / "Modelfile").exists()


def test_a_model_without_a_chat_template_has_a_modelfile_without(model: Path, tmp_path: Path) -> None:
    plain = pico_model("llama", tmp_path / "model", **EVEN)
    (plain / "chat_template.jinja").unlink()
    run(recipe(plain, tmp_path / "out", serializer=FORMAT | {"modelfile": True}))
    assert (tmp_path / "out" / "Modelfile").read_text() == 'FROM ./model.gguf\nPARAMETER stop "</s>"\n'
