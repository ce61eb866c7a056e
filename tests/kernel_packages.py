"""Machines without the packages of kernels."""

import sys
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from dashq.runtime.kernels import is_installed

PACKAGES = ("numba", "auto_round_kernel")


@contextmanager
def without_packages(monkeypatch: pytest.MonkeyPatch, *names: str) -> Generator[None]:
    """Let no import of these packages, all of them if none is named, succeed until the `with` statement ends."""
    is_installed.cache_clear()
    with monkeypatch.context() as patched:
        for name in names or PACKAGES:
            patched.setitem(sys.modules, name, None)
        yield
    is_installed.cache_clear()
