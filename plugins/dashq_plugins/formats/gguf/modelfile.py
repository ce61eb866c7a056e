"""The Modelfile of Ollama: the GGUF file, the model's chat template in Go's syntax, and what ends an answer."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dashq.errors import TextError
from dashq.model.mappings import mapping_or_empty

if TYPE_CHECKING:
    import transformers

    from dashq.calibration.chat import Render

MODELFILE = "Modelfile"
# Settings of `generation_config.json`, and Ollama's names for them.
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
Message = Mapping[str, str]
SYSTEM = {"role": "system", "content": "SYSTEM-0"}
USERS = [{"role": "user", "content": f"USER-{number}"} for number in (1, 2, 3)]
ANSWERS = [{"role": "assistant", "content": f"ANSWER-{number}"} for number in (1, 2, 3)]


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The texts that a chat template puts around messages, where it treats all turns alike.

    `first` precedes the first message of a user, unless a system's does: that stands between both texts of `system`.
    `answer` lies between a user's message and the answer, `next` between that and the next message, and `prompt`
    follows the last message.
    """

    first: str
    system: tuple[str, str]
    answer: str
    next: str
    prompt: str

    def text(self, messages: Sequence[Message]) -> str:
        """The text of messages of a system, if at all, and of users and assistants in turn, up to the next answer."""
        parts = []
        for index, message in enumerate(messages):
            last = index == len(messages) - 1
            before, behind = {
                "system": self.system,
                "user": ("" if index else self.first, self.prompt if last else self.answer),
                "assistant": ("", self.next),
            }[message["role"]]
            parts += [before, message["content"], behind]
        return "".join(parts)

    def in_go(self) -> str:
        """The same as a template of Go's text/template, as Ollama fills it in."""
        first = "{{ if eq $i 0 }}" + _go(self.first) + "{{ end }}" if self.first else ""
        last = "{{ if eq (len (slice $.Messages $i)) 1 }}" + _go(self.prompt) + "{{ else }}"
        answer = _go(self.answer) if self.prompt == self.answer else last + _go(self.answer) + "{{ end }}"
        roles = {
            "system": (_go(self.system[0]), _go(self.system[1])),
            "user": (first, answer),
            "assistant": ("", _go(self.next)),
        }
        cases = "{{ else if ".join(
            f'eq $m.Role "{role}" }}}}{before}{{{{ $m.Content }}}}{behind}' for role, (before, behind) in roles.items()
        )
        return "{{ range $i, $m := .Messages }}{{ if " + cases + "{{ end }}{{ end }}"


def modelfile(folder: Path, file: str, tokenizer: "transformers.PreTrainedTokenizerBase", begins: bool) -> str:
    """The Modelfile for a GGUF `file` in a result's folder; `begins` where llama.cpp begins texts with a token itself.

    A template that treats turns differently, or fails, is left to Ollama, which knows many from the file.
    """
    from dashq.calibration.chat import chat_template  # it imports transformers

    lines = [f"FROM ./{file}"]
    ends = _ends(folder, tokenizer)
    try:
        with chat_template(tokenizer, answering=True) as render:
            turns = turns_of(render, str(tokenizer.bos_token) if begins and tokenizer.bos_token else "")
    except TextError:
        turns = None
    if turns:
        lines.append(f'TEMPLATE """{turns.in_go()}"""')
        ends = [*ends, *(token for token in _special(tokenizer) if turns.next.startswith(token))]
    lines += [f'PARAMETER stop "{end}"' for end in dict.fromkeys(ends) if '"' not in end]
    settings = mapping_or_empty(folder / "generation_config.json")
    for name, parameter in PARAMETERS.items():
        if isinstance(value := settings.get(name), int | float):
            lines.append(f"PARAMETER {parameter} {value}")
    return "\n".join(lines) + "\n"


def turns_of(render: "Render", beginning: str) -> Turns | None:
    """The turns of a chat template, found by trying it; None where it fails, or treats turns differently.

    `render` ends texts with what precedes the next answer. `beginning` is a token's text that does not count at the
    beginning, since it is added in any case.
    """
    turns = [message for pair in zip(USERS, ANSWERS, strict=True) for message in pair]
    try:
        whole, short = _around(render, turns), _around(render, turns[:3])
    except TextError:
        return None
    # The last answer and what follows it may be special: what counts is that those before are alike.
    if whole is None or short is None or whole[1:3] != whole[3:5] or whole[:3] != short[:3]:
        return None
    first, answer, following = whole[0].removeprefix(beginning), *whole[1:3]
    try:
        parts = _around(render, [SYSTEM, *turns])
    except TextError:
        parts = None
    if parts is not None and parts[2:6] == whole[1:5]:
        system = parts[0].removeprefix(beginning), parts[1]
    else:  # the template knows no system: its text begins the user's message
        system = first, "\n\n"
    result = Turns(first=first, system=system, answer=answer, next=following, prompt=short[-1])
    return None if '"""' in result.in_go() else result  # the quotes of a Modelfile


def _around(render: "Render", messages: Sequence[Message]) -> list[str] | None:
    """The texts around messages and between them; None where these do not stand there once each, in their order."""
    text, contents = render([dict(message) for message in messages]), [message["content"] for message in messages]
    pattern = "|".join(map(re.escape, contents))
    return re.split(pattern, text) if re.findall(pattern, text) == contents else None


def _go(text: str) -> str:
    """A text as it stands in a template of Go's."""
    return text.replace("{{", '{{ "{{" }}')


def _ends(folder: Path, tokenizer: "transformers.PreTrainedTokenizerBase") -> list[str]:
    """The tokens that end an answer, as the settings for generation and the tokenizer have them."""
    numbers: Any = mapping_or_empty(folder / "generation_config.json").get("eos_token_id", [])
    listed = numbers if isinstance(numbers, list) else [numbers]
    known = [number for number in listed if isinstance(number, int) and 0 <= number < len(tokenizer)]
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(known)]
    return [*names, *([str(tokenizer.eos_token)] if tokenizer.eos_token else [])]


def _special(tokenizer: "transformers.PreTrainedTokenizerBase") -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
