"""Processes tell when they fail, and are missed when they fall silent."""

import os
import time
from typing import Any

import pytest

from dashq.processes import watch as under_test
from dashq.processes.watch import Watch

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


class Store:
    """What processes share, in this one."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def clone(self) -> "Store":
        return self

    def set(self, key: str, value: str) -> None:
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        if self.values.get(key, b"").decode() == expected:
            self.set(key, value)
        return self.values[key]


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The codes with which processes would have ended, in watches that look often."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise SystemExit  # ends the thread alone

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(under_test, "BEAT", 0.01)
    monkeypatch.setattr(under_test, "SILENCE", 0.2)
    return codes


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_failure_is_told_and_ends_the_others(exits: list[int]) -> None:
    store = Store()
    first, second = (Watch(store, rank, 2, f"process {rank} of 2") for rank in range(2))
    assert second.tell("the disk is full")
    assert store.values["failure"] == b"process 1 of 2: the disk is full"
    wait_until(lambda: exits == [2])
    assert not first.tell("nobody answers")  # since it was told before
    for watch in (first, second):
        watch.end()


def test_a_process_that_falls_silent_is_named(exits: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    store = Store()
    store.set("alive/1", "7 process 1 of 2 on elsewhere")
    watch = Watch(store, 0, 2, "process 0 of 2")
    wait_until(lambda: exits)
    watch.end()
    said = capfd.readouterr().err
    assert said.startswith("dashq: process 1 of 2 on elsewhere has given no sign of life for 0.2 seconds: the same")


def test_a_process_that_is_done_is_not_missed(exits: list[int]) -> None:
    store = Store()
    first, second = (Watch(store, rank, 2, f"process {rank} of 2") for rank in range(2))
    second.end()
    time.sleep(0.5)
    first.end()
    assert not exits


def test_a_watch_whose_store_is_gone_ends_its_process(
    exits: list[int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store()
    watch = Watch(store, 1, 2, "process 1 of 2")

    def gone(*words: Any) -> Any:
        raise RuntimeError("broken pipe")

    for name in ("set", "check", "compare_set"):
        monkeypatch.setattr(store, name, gone)
    wait_until(lambda: exits)
    watch.end()
    assert "the process that the others meet at is gone" in capfd.readouterr().err
