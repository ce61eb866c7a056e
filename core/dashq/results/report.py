"""The report beside a result, `report.json`: how large its layers are, how exact, and how they came about."""

import functools
import hashlib
import importlib.metadata
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from dashq.data import Layer, Quantized, Role, average_bits
from dashq.errors import CheckpointError
from dashq.model.mappings import read_mapping
from dashq.results.clock import Clock
from dashq.results.judged import Judgement
from dashq.results.tuned import Tuned
from dashq.solving.certificate import Certificate
from dashq.strict import first_mistake

REPORT = "report.json"
# An expert that the model sends fewer calibration tokens than this is called starved.
STARVED_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized layer. Errors are Σ h (w - ŵ)² / Σ h w², with h the diagonal of the layer's curvature.

    `statistics` are figures of the estimator and of the solver, such as its number of iterations; `digest` is that of
    the solver's result; `type` is one of the format's, where that is not the usual one at its bits.
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
    role: Role = "linear"
    type: str | None = None
    effective_tokens: float | None = None
    shrinkage: float = 0.0
    fallbacks: tuple[str, ...] = ()
    certificate: Certificate | None = None
    statistics: Mapping[str, float] = field(default_factory=dict)

    @property
    def layer(self) -> Layer:
        """The layer that was quantized."""
        return Layer(name=self.name, rows=self.rows, columns=self.columns, expert=self.expert, role=self.role)


@dataclass(frozen=True)
class Selection:
    """Layers that were chosen from measurements, and `what` was chosen for them."""

    what: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class BudgetCurve:
    """The expected loss of a model's predictions against the bits of a weight, and the `bits_per_weight` of the budget.

    `points` are pairs of bits per weight and nats per token, by rising bits: the best choices among those measured.
    """

    bits_per_weight: float
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class MixtureReport:
    """One stack of experts: calibration tokens and shrinkage by expert, and the share of experts that was starved.

    Starved are those that the model sends fewer than `STARVED_TOKENS`, whatever the router plugin counts. `name` is
    that of the experts' layers with a star in the place of the expert's number.
    """

    name: str
    tokens: tuple[int, ...]
    shrinkage: tuple[float, ...]
    starved: float

    @property
    def mixture(self) -> str:
        """The name of the mixture that the stack belongs to, as in `model.layers.0.mlp.experts`."""
        before, _, after = self.name.partition(".*")
        return before if after else before.rpartition(".")[0]


@dataclass(frozen=True)
class Gaps:
    """The mean and the worst optimality gap of the layers that have a certificate, from `groups` groups in all."""

    mean_gap: float
    worst_gap: float
    groups: int


@dataclass(frozen=True, kw_only=True)
class Totals:
    """All quantized layers together; errors are means over layers.

    `bits_per_weight` are those of layers in blocks: embeddings and head have more, and count in `bits_per_parameter`.
    `bytes_on_disk` are those of all weights' files, in which the model's `parameters` lie, quantized or not; those that
    are tied count once.
    """

    layers: int
    weights: int
    bits_per_weight: float
    bytes_on_disk: int
    parameters: int = 0  # in reports of earlier versions
    bits_per_parameter: float = 0.0
    mean_error: float
    mean_minmax_error: float
    mixtures: tuple[MixtureReport, ...]
    certificate: Gaps | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """The content of `report.json`.

    `seconds` are those of each phase; `calibration` was done by the run, or read from what an earlier one had kept, or
    both, where it was interrupted. `computed` says on which device and in which type, `versions` are those of the
    programs. `warnings` are sentences on what of the model is not in the result. `device_bytes` is the most memory that
    was in use on a graphics processor, where the run had one. `judgement` compares the result with the original model;
    `tuned` says how scales, offsets and norms learned from it, where they did, `budget` what a budget could choose
    from. `original` has the bytes of the original's weights: of its `layers` that are quantized here, `embeddings`,
    `head`, and `others`. `base_model` is that model's name on
    the hub, None where it was a folder. `files` are the names of all files that the run wrote, this one among them,
    `tensors` the digests of all tensors by name, `file_digests` those of the files that were carried over from the
    model, `config` the model's part of `config.json`.
    """

    totals: Totals
    seconds: Mapping[str, float]
    computed: str
    calibration: Literal["done", "read", "partly read"] = "done"
    device_bytes: int | None = None
    versions: Mapping[str, str]
    chosen: tuple[Selection, ...]
    budget: BudgetCurve | None = None
    original: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    judgement: Judgement | None = None
    tuned: Tuned | None = None
    layers: tuple[LayerReport, ...]
    base_model: str | None = None
    files: tuple[str, ...] = ()
    tensors: Mapping[str, str] = field(default_factory=dict)
    file_digests: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; `device_bytes` stands there only where the run had a graphics processor."""
        content = asdict(self)
        if self.device_bytes is None:
            del content["device_bytes"]
        return content


_REPORT = TypeAdapter(Report)


def read_report(folder: Path) -> Report:
    """The report of a finished result; a `CheckpointError` where the file is missing or not as dashq writes it."""
    path = folder / REPORT
    try:
        return _REPORT.validate_python(read_mapping(path))
    except ValidationError as error:
        raise CheckpointError(f"{path} is not as this dashq writes it: {first_mistake(error)}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not as this dashq writes it: {error}") from error


def summarize(
    layers: Sequence[LayerReport],
    clock: Clock,
    total_bytes: int,
    computed: str,
    parameters: int,
    selections: Sequence[Selection] = (),
    warnings: Sequence[str] = (),
) -> Report:
    """The report of a run that quantized these `layers`, at least one, of a model with as many `parameters` in all."""
    weights = sum(report.layer.weights for report in layers)
    totals = Totals(
        layers=len(layers),
        weights=weights,
        bits_per_weight=average_bits((layer.layer, layer.bytes) for layer in layers),
        parameters=parameters,
        bits_per_parameter=8 * total_bytes / parameters,
        bytes_on_disk=total_bytes,
        mean_error=sum(layer.error for layer in layers) / len(layers),
        mean_minmax_error=sum(layer.minmax_error for layer in layers) / len(layers),
        mixtures=mixtures(layers),
        certificate=overall([layer.certificate for layer in layers if layer.certificate]),
    )
    return Report(
        totals=totals,
        seconds={phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
        computed=computed,
        calibration=_calibration(clock.seconds),
        device_bytes=torch.cuda.max_memory_allocated(clock.device) if clock.device.type == "cuda" else None,
        versions=versions(),
        chosen=tuple(selections),
        warnings=tuple(warnings),
        layers=tuple(layers),
    )


def _calibration(seconds: Mapping[str, float]) -> Literal["done", "read", "partly read"]:
    """The way in which a run that spent so many seconds in each phase knew about layers' inputs."""
    if "take" not in seconds:
        return "done"
    return "partly read" if "calibrate" in seconds else "read"


def mixtures(layers: Sequence[LayerReport]) -> tuple[MixtureReport, ...]:
    """A report on each stack of experts, in the order of their first layers."""
    stacks: dict[str, list[LayerReport]] = defaultdict(list)
    for report in layers:
        if (stack := report.layer.stack) is not None:
            stacks[stack].append(report)
    return tuple(
        MixtureReport(
            name=name,
            tokens=tuple(expert.tokens for expert in experts),
            shrinkage=tuple(expert.shrinkage for expert in experts),
            starved=sum(expert.tokens < STARVED_TOKENS for expert in experts) / len(experts),
        )
        for name, experts in stacks.items()
    )


def overall(certificates: Sequence[Certificate]) -> Gaps | None:
    """The optimality gaps of all layers together, each weighted by its number of groups; None without certificates."""
    if not certificates:
        return None
    groups = sum(certificate.groups for certificate in certificates)
    return Gaps(
        mean_gap=sum(certificate.gap * certificate.groups for certificate in certificates) / groups,
        worst_gap=max(certificate.gap for certificate in certificates),
        groups=groups,
    )


def digest(quantized: Quantized) -> str:
    """A fingerprint of codes, scales, offsets and the order of columns, the same in every type that a format keeps."""
    q = quantized
    numbers = [q.codes.flatten(1)[:, : q.grouping.columns], q.scale.float(), q.offset.float() + 0.0]  # no -0.0
    numbers += [] if q.grouping.order is None else [q.grouping.order.int()]
    content = hashlib.sha256()
    for tensor in numbers:
        content.update(tensor.cpu().contiguous().numpy().data)
    return content.hexdigest()[:16]


def versions() -> dict[str, str]:
    """The programs whose version a result can depend on."""
    packages = ("dashq", "torch", "transformers", "safetensors")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


@functools.cache
def _version(package: str) -> str:
    """The version of an installed package, whose metadata is searched for and read once."""
    return importlib.metadata.version(package)
