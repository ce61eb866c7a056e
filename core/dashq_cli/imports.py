"""The garbage collector rests while libraries are imported."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def resting_collector() -> Generator[None]:
    """No garbage is collected inside the `with` statement.

    torch and transformers make half a million objects when they are imported, nearly all of which stay. The collector
    would look through them hundreds of times, which takes a fifth of a short command's time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
