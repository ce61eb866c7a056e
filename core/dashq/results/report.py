"""What a run has to tell: events while it goes, and the report beside the result."""

import hashlib
import importlib.metadata
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dashq.data import Layer, Quantized
from dashq.device import wait_for
from dashq.solving.certificate import Certificate


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized layer. Errors are Σ h (w - ŵ)² / Σ h w², with h the diagonal of the layer's curvature.

    `statistics` are the solver's own, such as how many iterations it took; `digest` is that of the solver's result.
    For an expert, `tokens` are those that the model sends to it, `effective_tokens` what the counted ones are worth,
    `shrinkage` the share of the pooled estimate.
    """

    name: str
    rows: int
    columns: int
    bits: int
    group_size: int
    ordered: bool
    bytes: int
    digest: str
    solver: str
    estimator: str
    tokens: int
    error: float
    minmax_error: float
    seconds: float
    expert: int | None = None
    effective_tokens: float | None = None
    shrinkage: float = 0.0
    fallbacks: tuple[str, ...] = ()
    certificate: Certificate | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)

    @property
    def layer(self) -> Layer:
        """The layer that was quantized."""
        return Layer(name=self.name, rows=self.rows, columns=self.columns, expert=self.expert)


def digest(quantized: Quantized) -> str:
    """A fingerprint of codes, scales, offsets and the order of columns, whatever types a format keeps them in."""
    q = quantized
    numbers = [q.codes.flatten(1)[:, : q.grouping.columns], q.scale.float(), q.offset.float() + 0.0]  # no -0.0
    numbers += [] if q.grouping.order is None else [q.grouping.order.int()]
    content = hashlib.sha256()
    for tensor in numbers:
        content.update(tensor.cpu().contiguous().numpy().data)
    return content.hexdigest()[:16]


@dataclass(frozen=True)
class Selection:
    """Layers that were chosen from measurements, and `what` was chosen for them."""

    what: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Measuring:
    """What layers cost the model is being measured, before a run or in its place; so many of `steps` are done."""

    what: str
    done: int
    steps: int


@dataclass(frozen=True)
class RunStarted:
    """The plan is made and the text is read. `computed` says where and in which type, as `on cpu in bfloat16`."""

    blocks: int
    layers: int
    tokens: int
    computed: str


@dataclass(frozen=True)
class LayerDone:
    """One layer is quantized; it is on disk when its shard is."""

    report: LayerReport


@dataclass(frozen=True)
class BlockDone:
    """All layers of a block are done, now or in the run that this one resumes."""

    name: str
    index: int


Event = Measuring | RunStarted | LayerDone | BlockDone
Listener = Callable[[Event], None]


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


def summarize(
    layers: list[LayerReport], clock: Clock, total_bytes: int, computed: str, selections: Sequence[Selection] = ()
) -> dict[str, Any]:
    """The content of `report.json`."""
    weights = sum(report.layer.weights for report in layers)
    return {
        "totals": {
            "layers": len(layers),
            "weights": weights,
            "bits_per_weight": 8 * sum(layer.bytes for layer in layers) / weights,
            "bytes_on_disk": total_bytes,
            "mean_error": sum(layer.error for layer in layers) / len(layers),
            "mean_minmax_error": sum(layer.minmax_error for layer in layers) / len(layers),
            "mixtures": mixtures(layers),
            "certificate": overall([layer.certificate for layer in layers if layer.certificate]),
        },
        "seconds": {phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
        "computed": computed,
        **({"device_bytes": torch.cuda.max_memory_allocated(clock.device)} if clock.device.type == "cuda" else {}),
        "versions": versions(),
        "chosen": [asdict(selection) for selection in selections],
        "layers": [asdict(layer) for layer in layers],
    }


# An expert that the model sends fewer calibration tokens than this is called starved.
STARVED_TOKENS = 64


def mixtures(layers: Sequence[LayerReport]) -> list[dict[str, Any]]:
    """Of each stack of experts: its tokens by expert, how much each was shrunk, and the share that was starved.

    That share is of experts which the model sends fewer than `STARVED_TOKENS`, whatever the router plugin counts.
    """
    stacks: dict[str, list[LayerReport]] = defaultdict(list)
    for report in layers:
        if (stack := report.layer.stack) is not None:
            stacks[stack].append(report)
    return [
        {
            "name": name,
            "tokens": [expert.tokens for expert in experts],
            "shrinkage": [expert.shrinkage for expert in experts],
            "starved": sum(expert.tokens < STARVED_TOKENS for expert in experts) / len(experts),
        }
        for name, experts in stacks.items()
    ]


def overall(certificates: Sequence[Certificate]) -> dict[str, float] | None:
    """The mean and the worst optimality gap of the layers that have one, and how many groups tell."""
    if not certificates:
        return None
    groups = sum(certificate.groups for certificate in certificates)
    return {
        "mean_gap": sum(certificate.gap * certificate.groups for certificate in certificates) / groups,
        "worst_gap": max(certificate.gap for certificate in certificates),
        "groups": groups,
    }


def versions() -> dict[str, str]:
    """The programs whose version a result can depend on."""
    packages = ("dashq", "torch", "transformers", "safetensors")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
