"""Machines without the packages of kernels."""

import sys
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from dashq.runtime.kernels import is_installed


@contextmanager
def without_package(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Let no import of auto-round-kernel succeed until the `with` statement ends."""
    is_installed.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "auto_round_kernel", None)
        yield
    is_installed.cache_clear()
