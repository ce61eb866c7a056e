"""Progress bars of other packages switched off: one for each block would drown the run's own."""

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def without_progress_bars() -> Generator[None]:
    """No progress bars of transformers and of the hub for the duration of the `with` statement, or of a function."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
