"""A spy on the passes of calibration's samples through blocks, for tests of runs that need none."""

from collections.abc import Callable
from typing import Any

import pytest

from dashq import Recipe, run
from dashq.calibration.stream import Stream
from dashq.results.events import Event, RunStarted


class Passes:
    """Counts the times that calibration moves samples through a block, and hears what runs say of what is kept."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, self.said, self.warnings = 0, "", tuple[str, ...]()
        begin, advance = Stream.__init__, Stream.advance
        calibrating: list[Stream] = []

        def begun(stream: Stream, *arguments: Any, **options: Any) -> None:
            begin(stream, *arguments, **options)
            if options.get("shares"):  # the judge's stream has none
                calibrating.append(stream)

        def counted(stream: Stream, *arguments: Any) -> None:
            self.count += any(stream is other for other in calibrating)
            advance(stream, *arguments)

        patch.setattr(Stream, "__init__", begun)
        patch.setattr(Stream, "advance", counted)

    def listen(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.said, self.warnings = event.kept, event.warnings

    def of(self, recipe: Recipe, listen: Callable[[Event], None] | None = None) -> int:
        """The passes of one run."""
        self.count = 0
        run(recipe, listen or self.listen)
        return self.count
