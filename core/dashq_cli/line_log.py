"""The progress of a run where no terminal shows a bar: a line at every change, and at least every half minute."""

import threading
import time
from dataclasses import dataclass, replace
from typing import Self

from rich.console import Console

from dashq.results.events import BlockDone, Event, LayerDone, Measuring, PhaseBegun, RunStarted, Tuning
from dashq_cli.progress import JsonLog, Log, ProgressBar, Silence, duration, print_kept, print_warnings

SECONDS = 30.0  # from one line to the next, at most


@dataclass(frozen=True)
class Phase:
    """Something that is done now, since `began`.

    `steps` is None as long as nobody knows how many there are. Their pace is that of those after the `first`, which
    were done at the time `timed`.
    """

    what: str
    began: float
    timed: float
    first: int = 0
    done: int = 0
    steps: int | None = None

    def sentence(self, now: float) -> str:
        """The phase in words, with the time left as soon as there is a pace."""
        elapsed = now - self.began
        parts = [self.what if self.steps is None else f"{self.what}: {self.done} of {self.steps}"]
        parts.append(f"{duration(elapsed)} elapsed")
        if self.steps and self.done > self.first:
            left = (now - self.timed) / (self.done - self.first) * (self.steps - self.done)
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def advanced(self, now: float, is_usual: bool) -> "Phase":
        """With another step done; one that is not as others are, such as the first to need a kernel, sets no pace."""
        after = replace(self, done=self.done + 1)
        return after if is_usual else replace(after, first=after.done, timed=now)


class LineLog:
    """Prints where a run is, for logs and pipes."""

    def __init__(self, console: Console, walk: str, seconds: float = SECONDS) -> None:
        """`walk` says what is done with the blocks."""
        self._console, self._walk, self._seconds = console, walk, seconds
        self._phase = _begun("reading the model")
        self._blocks = self._phase  # the walk over the blocks, to go back to when something inside it is done
        self._interrupted = False  # in the block that is done now, by something that others do not wait for
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._ended.set()
        self._thread.join()

    def hear(self, event: Event) -> None:
        """Take note of where the run is, and print it where something else begins."""
        if isinstance(event, PhaseBegun):
            self._interrupted = True
            self._go_on(event.what, 0, None)
        elif isinstance(event, Measuring):
            self._go_on(f"measuring {event.what}", event.done, event.steps)
        elif isinstance(event, RunStarted):
            self._go_on(f"{self._walk} {event.computed}", 0, event.blocks)
            self._blocks, self._interrupted = self._phase, False
            print_kept(self._console, event)
            print_warnings(self._console, event.warnings)
        elif isinstance(event, LayerDone):
            self._phase = self._blocks
        elif isinstance(event, BlockDone):
            self._phase = self._blocks = self._blocks.advanced(time.monotonic(), not self._interrupted)
            self._interrupted = False
        elif isinstance(event, Tuning):
            self._go_on(f"tuning, divergence {event.check.divergence:.3f}", event.check.step, event.steps)

    def _go_on(self, what: str, done: int, steps: int | None) -> None:
        old = self._phase
        if what.split(",")[0] == old.what.split(",")[0]:  # behind a comma stands what changes from step to step
            self._phase = replace(old, what=what, done=done)
        else:
            self._phase = _begun(what, done, steps)
            self.print()

    def _repeat(self) -> None:
        while not self._ended.wait(self._seconds):
            self.print()

    def print(self) -> None:
        """Print where the run is now."""
        self._console.print(self._phase.sentence(time.monotonic()), highlight=False, markup=False, soft_wrap=True)


def _begun(what: str, done: int = 0, steps: int | None = None) -> Phase:
    now = time.monotonic()
    return Phase(what, now, now, done, done, steps)


def log_for(quiet: bool, log_json: bool, walk: str = "quantizing blocks") -> Log:
    """The log that the options ask for; without any, a bar on a terminal, and lines elsewhere."""
    console = Console()
    if log_json:
        return JsonLog()
    if quiet:
        return Silence()
    return ProgressBar(console, walk) if console.is_terminal else LineLog(console, walk)
