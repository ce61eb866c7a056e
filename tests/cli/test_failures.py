"""An exception that ends a command is one line where the user can mend it; its traceback is shown on demand."""

import importlib.metadata
from collections.abc import Callable
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace

import pytest

from dashq import PlanError
from dashq_cli.failures import explain, is_interruption

CODE = """
def solve(call):
    return helper(call)


def helper(call):
    return call()
"""


class StrangerEntry(EntryPoint):
    """An entry point of a package that is not ours."""

    dist = SimpleNamespace(name="dashq-of-a-stranger")  # type: ignore[assignment]


@pytest.fixture
def solve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], object]:
    """A function in the module of a stranger's plugin; it calls what it is given."""
    entries = [StrangerEntry("of_a_stranger", "strange.plugin", "dashq")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    module = ModuleType("strange.other_module")
    exec(compile(CODE, "other_module.py", "exec"), vars(module))
    function: Callable[[Callable[[], object]], object] = module.solve
    return function


def caught(function: Callable[..., object], *arguments: object) -> Exception:
    try:
        function(*arguments)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def fail() -> None:
    raise ZeroDivisionError("division\nby zero")


def test_an_interruption_is_one_whatever_it_was_taken_for() -> None:
    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error

    def refused() -> None:
        try:
            interrupted()
        except ModuleNotFoundError:
            raise PlanError("it cannot be opened")  # noqa: B904

    assert is_interruption(KeyboardInterrupt())
    assert is_interruption(caught(interrupted))
    assert is_interruption(caught(refused))
    assert not is_interruption(caught(fail))


def test_whatever_a_plugin_of_another_package_raises_names_it_and_the_place(
    solve: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(caught(solve, fail)) == (
        "plugin 'of_a_stranger' from dashq-of-a-stranger fails in helper (strange.other_module, line 7): "
        "ZeroDivisionError: division by zero. DASHQ_TRACEBACK=1 shows all of it; to go on without it, set "
        "DASHQ_DISABLE_PLUGINS=of_a_stranger"
    )
    assert not capsys.readouterr().err


def test_a_bug_of_ours_is_no_line_for_the_user(solve: Callable[..., object]) -> None:
    assert explain(caught(fail)) is None


def test_tracebacks_are_shown_on_demand(
    solve: Callable[..., object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DASHQ_TRACEBACK", "1")
    assert explain(PlanError("no such bits")) == "no such bits"
    assert "PlanError: no such bits" in capsys.readouterr().err
    explain(caught(solve, fail))
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_what_would_command_the_terminal_is_shown_as_it_is_written() -> None:
    assert explain(PlanError("the layer \x1b[2Jred\x07\nand\x9b more")) == "the layer \\x1b[2Jred\\x07\nand\\x9b more"
