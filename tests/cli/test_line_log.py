"""Where there is no terminal, a line says what begins, and another comes at least every so many seconds."""

import io
import threading

import pytest
from rich.console import Console

from dashq.results.events import BlockDone, Measuring, PhaseBegun, RunStarted, Tuning
from dashq.results.tuned import TuningCheck
from dashq_cli.line_log import LineLog, Phase, log_for
from dashq_cli.progress import JsonLog, ProgressBar, Silence


class Heard(io.StringIO):
    """A file that says when it has so many lines."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.enough, self._lines = threading.Event(), lines

    def write(self, text: str) -> int:
        count = super().write(text)
        if self.getvalue().count("\n") >= self._lines:
            self.enough.set()
        return count


def lines_of(*events: object) -> list[str]:
    file = io.StringIO()
    with LineLog(Console(file=file, width=80), "quantizing blocks", seconds=3600) as log:
        for event in events:
            log.hear(event)  # type: ignore[arg-type]
    return file.getvalue().splitlines()


def test_each_phase_is_told_once_when_it_begins() -> None:
    lines = lines_of(
        PhaseBegun("reading text"),
        Measuring("gradients", 0, 8),
        Measuring("gradients", 1, 8),
        RunStarted(30, 210, 4096, "on cpu in float32", ("weights are lost",)),
        PhaseBegun("compiling kernels"),
        BlockDone("model.layers.0", 0),
        Tuning(TuningCheck(step=0, divergence=0.5, loss=None), 60),
        Tuning(TuningCheck(step=7, divergence=0.25, loss=None), 60),
    )
    assert lines == [
        "reading text, 0 seconds elapsed",
        "measuring gradients: 0 of 8, 0 seconds elapsed",
        "quantizing blocks on cpu in float32: 0 of 30, 0 seconds elapsed",
        "warning weights are lost",
        "compiling kernels, 0 seconds elapsed",
        "tuning, divergence 0.500: 0 of 60, 0 seconds elapsed",
    ]


def test_lines_come_by_themselves_while_nothing_happens() -> None:
    file = Heard(3)
    with LineLog(Console(file=file, width=80), "quantizing blocks", seconds=0.001):
        assert file.enough.wait(60)
    assert set(file.getvalue().splitlines()) == {"reading the model, 0 seconds elapsed"}


def test_a_long_line_stays_one_line() -> None:
    [line] = lines_of(RunStarted(30, 210, 4096, "on a device with a very long name " * 4))
    assert len(line) > 80


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        (Phase("reading", 0.0, 0.0), "reading, 10 minutes elapsed"),
        (Phase("blocks", 0.0, 0.0, 0, 3, 30), "blocks: 3 of 30, 10 minutes elapsed, about 90 minutes left"),
        (Phase("steps", 0.0, 0.0, 20, 20, 30), "steps: 20 of 30, 10 minutes elapsed"),
        (Phase("steps", 0.0, 0.0, 20, 25, 30), "steps: 25 of 30, 10 minutes elapsed, about 10 minutes left"),
    ],
)
def test_the_time_left_follows_from_the_steps_done_here(phase: Phase, sentence: str) -> None:
    assert phase.sentence(600.0) == sentence


def test_a_step_that_is_not_as_others_are_sets_no_pace() -> None:
    compiling = Phase("blocks", 0.0, 0.0, 0, 0, 30).advanced(60.0, is_usual=False)
    assert compiling.sentence(60.0) == "blocks: 1 of 30, 60 seconds elapsed"
    assert compiling.advanced(62.0, is_usual=True).sentence(62.0) == (
        "blocks: 2 of 30, 62 seconds elapsed, about 56 seconds left"
    )


def test_the_walk_goes_on_where_it_was_when_kernels_are_compiled_and_that_block_sets_no_pace() -> None:
    file = io.StringIO()
    with LineLog(Console(file=file, width=80), "quantizing blocks", seconds=3600) as log:
        for event in (RunStarted(3, 21, 120, "on cpu"), PhaseBegun("compiling kernels"), BlockDone("layers.0", 0)):
            log.hear(event)
        log.print()
        log.hear(BlockDone("layers.1", 1))
        log.print()
    first, second = file.getvalue().splitlines()[-2:]
    assert first.startswith("quantizing blocks on cpu: 1 of 3, ")
    assert second.startswith("quantizing blocks on cpu: 2 of 3, ")
    assert ("left" in first, "left" in second) == (False, True)


def test_the_options_choose_the_log() -> None:
    assert isinstance(log_for(quiet=True, log_json=False), Silence)
    assert isinstance(log_for(quiet=False, log_json=True), JsonLog)
    assert isinstance(log_for(quiet=False, log_json=False), LineLog)


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(log_for(quiet=False, log_json=False), ProgressBar)


def test_it_ends_at_once() -> None:
    before = threading.active_count()
    with LineLog(Console(file=io.StringIO()), "quantizing blocks"):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
