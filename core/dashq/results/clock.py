"""The clock of a run: seconds spent in each of its phases."""

import time
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dashq.device import wait_for


@dataclass
class Clock:
    """Seconds spent in each phase of a run that computes on `device`."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def measuring(self, phase: str) -> Generator[None]:
        """Add the time that the `with` statement takes to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            wait_for(self.device)
            self.seconds[phase] += time.perf_counter() - start
