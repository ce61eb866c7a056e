"""The seconds of a phase are those that its work takes, wherever it is computed and however it ends."""

import time

import pytest
import torch

from dashq.results.clock import Clock
from pretend_device import DEVICE, pretended_device

CPU = torch.device("cpu")


def test_a_phase_that_comes_again_adds_up_and_others_are_apart() -> None:
    clock = Clock(CPU)
    with clock.measuring("solve"):
        time.sleep(0.01)
    first = clock.seconds["solve"]
    assert first >= 0.01
    with clock.measuring("solve"), clock.measuring("write"):
        time.sleep(0.01)
    assert clock.seconds["solve"] >= first + 0.01
    assert clock.seconds.keys() == {"solve", "write"}
    assert clock.seconds["solve"] - first >= clock.seconds["write"] >= 0.01


def test_a_phase_that_fails_has_taken_its_time_too() -> None:
    clock = Clock(CPU)
    with pytest.raises(ValueError, match="broken"), clock.measuring("solve"):
        raise ValueError("broken")
    assert clock.seconds["solve"] > 0


def test_seconds_are_those_of_the_device() -> None:
    with pretended_device():
        with Clock(DEVICE).measuring("solve"):
            assert not torch.cuda.synchronize.called  # type: ignore[attr-defined]
        torch.cuda.synchronize.assert_called_once_with(DEVICE)  # type: ignore[attr-defined]


def test_seconds_on_the_cpu_wake_no_graphics_processor() -> None:
    initialized = torch.cuda.is_initialized()
    with Clock(CPU).measuring("solve"):
        pass
    assert torch.cuda.is_initialized() == initialized
