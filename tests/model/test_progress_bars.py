"""Bars are silent while models are opened, and only then: importing dashq changes nothing for others."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from transformers.utils import logging

from dashq.model.progress_bars import without_progress_bars

IMPORTED = """
import datasets, torch
from transformers.utils import logging

def state():
    bars = logging.is_progress_bar_enabled(), datasets.utils.are_progress_bars_disabled()
    return bars, logging.get_verbosity(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()

before = state()
import dashq
assert state() == before
"""


@pytest.mark.parametrize("enabled", [True, False])
def test_they_are_afterwards_as_they_were_before(enabled: bool) -> None:
    set_bars: dict[bool, Callable[[], None]] = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    before = logging.is_progress_bar_enabled()
    set_bars[enabled]()
    inside: list[bool] = []
    with pytest.raises(ValueError, match="broken"):
        _raise_without_bars(inside)
    after = logging.is_progress_bar_enabled()
    set_bars[before]()
    assert (inside, after) == ([False], enabled)


@without_progress_bars()
def _raise_without_bars(inside: list[bool]) -> None:
    inside.append(logging.is_progress_bar_enabled())
    raise ValueError("broken")


def test_importing_dashq_changes_nothing_in_the_process() -> None:
    subprocess.run([sys.executable, "-c", IMPORTED], check=True)
