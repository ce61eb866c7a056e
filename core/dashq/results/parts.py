"""The parts of a result as all processes of a run know them: the first one writes them, and tells the others."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from types import EllipsisType
from typing import Any

import torch
from jaxtyping import Shaped
from pydantic import TypeAdapter
from torch import Tensor

from dashq.data import StoredLayer
from dashq.device import type_name
from dashq.processes.group import here
from dashq.results.clock import Clock
from dashq.results.output import Output
from dashq.results.report import LayerReport
from dashq.results.settings import stored_layer
from dashq.strategies import Serializer

_LAYER = TypeAdapter(LayerReport)


class Parts:
    """The parts of a result in the order of a run, in the one `output` that the first process has."""

    def __init__(self, output: Output | None, clock: Clock) -> None:
        """Learn which parts are on disk; `output` is None in all processes but the first."""
        self.clock, self._output = clock, output
        self.finished = set(here().of_first(lambda: sorted(output.finished_parts) if output else []))

    def add(self, part: str, tensors: Mapping[str, Shaped[Tensor, "..."]], layers: Iterable[LayerReport] = ()) -> None:
        """Take in one finished part of the model, which all processes have."""
        if self._output:
            self._output.add(part, tensors, layers)

    def read(self, part: str, stored: StoredLayer, serializer: Serializer) -> Mapping[str, Tensor]:
        """The packed tensors of one layer of a finished part."""
        prefix = f"{stored.layer.name}."
        tensors = self._output.read(part, prefix) if self._output else {}
        packed = {key.removeprefix(prefix): value for key, value in tensors.items()}
        return packed_by(0, packed, stored, serializer)


def packed_by(
    rank: int, packed: Mapping[str, Shaped[Tensor, "..."]], stored: StoredLayer, serializer: Serializer
) -> Mapping[str, Tensor]:
    """The packed tensors of a layer that the process of this rank has, in every process.

    Their names, shapes and types follow from the plan, so that nothing but their bytes is sent.
    """
    if here().rank != rank:
        packed = {
            key: torch.empty(value.shape, dtype=value.dtype) for key, value in serializer.pack(stored.empty()).items()
        }
    here().broadcast([packed[key] for key in sorted(packed)], rank)
    return packed


def report_by(rank: int, report: LayerReport | None) -> LayerReport:
    """The report of a layer that the process of this rank has, in every process."""
    known: LayerReport = _LAYER.validate_python(here().of(rank, asdict(report) if report else None))
    return known


def layers_by_first(output: Output | None, serializer: Serializer) -> list[StoredLayer]:
    """The layers of the result that the first process has in its `output`, in every process."""
    reports = [asdict(layer) for layer in output.layers] if output else None
    return [stored_layer(_LAYER.validate_python(report), serializer) for report in here().of(0, reports)]


@dataclass(frozen=True, eq=False)
class SharedTensor:
    """A tensor that the first process has `stored`, in every process when it is indexed with `[...]`."""

    stored: Any  # None in all others

    def __getitem__(self, index: EllipsisType) -> Shaped[Tensor, "..."]:
        tensor: Tensor | None = None if self.stored is None else self.stored[index]
        known = None if tensor is None else (type_name(tensor.dtype), [*tensor.shape])
        dtype, shape = here().of(0, known)
        if tensor is None:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        here().broadcast([tensor], 0)
        return tensor


def shared_tensors(output: Output | None) -> Mapping[str, SharedTensor]:
    """The tensors of that result by name; all processes index the same ones with `[...]`, in the same order."""
    stored: Mapping[str, Any] = output.tensors() if output else {}
    return {name: SharedTensor(stored.get(name)) for name in here().of(0, sorted(stored))}


def tensors_by_first(output: Output | None, left_out: Collection[str] = ()) -> Mapping[str, Any]:
    """The same, but for those `left_out`, each read when it is indexed: by the first process from disk.

    The others are sent all of them at once, and have them in memory.
    """
    shared = shared_tensors(output) if here().count > 1 else {}
    sent: dict[str, Tensor] = {}
    for name, tensor in shared.items():
        if name not in left_out:
            value = tensor[...]
            if output is None:
                sent[name] = value
    return output.tensors() if output else sent
