"""What a run has to tell: events while it goes, and the report beside the result."""

import importlib.metadata
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized layer. Errors are Σ h (w - ŵ)² / Σ h w², with h the diagonal of the layer's curvature."""

    name: str
    rows: int
    columns: int
    bits: int
    group_size: int
    ordered: bool
    bytes: int
    solver: str
    estimator: str
    tokens: int
    error: float
    minmax_error: float
    seconds: float
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunStarted:
    """The plan is made and the text is read."""

    blocks: int
    layers: int
    tokens: int


@dataclass(frozen=True)
class LayerDone:
    """One layer is quantized; it is on disk when its shard is."""

    report: LayerReport


@dataclass(frozen=True)
class BlockDone:
    """All layers of a block are done, now or in the run that this one resumes."""

    name: str
    index: int


Event = RunStarted | LayerDone | BlockDone
Listener = Callable[[Event], None]


@dataclass
class Clock:
    """Seconds spent in each phase of a run."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def measuring(self, phase: str) -> Generator[None]:
        """Add the time that the `with` statement takes to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds[phase] += time.perf_counter() - start


def summarize(layers: list[LayerReport], clock: Clock, total_bytes: int) -> dict[str, Any]:
    """The content of `report.json`."""
    weights = sum(layer.rows * layer.columns for layer in layers)
    return {
        "totals": {
            "layers": len(layers),
            "weights": weights,
            "bits_per_weight": 8 * sum(layer.bytes for layer in layers) / weights,
            "bytes_on_disk": total_bytes,
            "mean_error": sum(layer.error for layer in layers) / len(layers),
            "mean_minmax_error": sum(layer.minmax_error for layer in layers) / len(layers),
        },
        "seconds": {phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
        "versions": versions(),
        "layers": [asdict(layer) for layer in layers],
    }


def versions() -> dict[str, str]:
    """The programs whose version a result can depend on."""
    packages = ("dashq", "torch", "transformers", "safetensors")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
