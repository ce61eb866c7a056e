"""The start of a command: while libraries are imported, the collector of garbage rests and a stop is at once."""

import gc
import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from dashq_cli import INTERRUPTED


@contextmanager
def starting() -> Generator[None]:
    """No garbage is collected inside the `with` statement, and Ctrl-C or SIGTERM end the process at once.

    torch and transformers make half a million objects when they are imported, nearly all of which stay. The collector
    would look through them hundreds of times, which takes a fifth of a short command's time. And they take whatever is
    raised while they are imported for a package that is missing, an interruption too. Nothing that was begun is lost.
    """
    handlers = {number: signal.signal(number, _end_at_once) for number in (signal.SIGINT, signal.SIGTERM)}
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)
