"""Commands start the processes that they are asked for, or take part in those that torchrun started."""

import sys

import pytest

from commands import call
from dashq_cli.processes import among


def test_one_process_is_the_one_that_speaks() -> None:
    with among(1) as is_first:
        assert is_first


def test_several_processes_are_started_with_the_command_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[list[str], int]] = []

    def launch(arguments: list[str], processes: int) -> int:
        started.append((arguments, processes))
        return 3

    monkeypatch.setattr("dashq.processes.launch.launch", launch)
    monkeypatch.setattr(sys, "argv", ["dashq", "run", "recipe.yaml", "--processes", "2"])
    with pytest.raises(SystemExit) as end, among(2):
        raise AssertionError("nothing is done here")
    assert end.value.code == 3
    assert started == [(["run", "recipe.yaml", "--processes", "2"], 2)]


def test_a_process_of_torchrun_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with among(2) as is_first:
        assert is_first


def test_no_process_at_all_is_refused() -> None:
    outcome = call("run", "recipe.yaml", "--processes", "0")
    assert outcome.code == 2
    assert "--processes" in outcome.errors
