"""The commands that there are, and a stop before the first of them."""

import sys
from types import ModuleType

import pytest

from commands import call, execute
from dashq_cli.app import app

COMMANDS = {
    *("init", "run", "plan", "sweep", "analyze", "eval", "chat", "compare", "report", "tune"),
    *("convert", "verify", "formats", "schema"),
}


def test_the_commands_have_these_names() -> None:
    assert {command.name for command in app.registered_commands} == COMMANDS
    assert [group.name for group in app.registered_groups] == ["plugins"]


def test_an_interruption_before_the_first_command_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "dashq_cli.app", Interrupted("dashq_cli.app"))
    outcome = call("--version")
    assert (outcome.code, outcome.output, outcome.errors) == (130, "", "")


@pytest.mark.parametrize(
    ("words", "completions"), [("dashq pl", ["plan", "plugins"]), ("dashq run --lo", ["--log-json"])]
)
def test_a_shell_can_complete_commands_and_options(words: str, completions: list[str]) -> None:
    position = str(len(words.split()) - 1)
    outcome = execute(_DASHQ_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=position)
    assert (outcome.code, outcome.output.split()) == (0, completions)
