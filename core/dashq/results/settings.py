"""Settings beside the tensors: what `config.json` and the files of a format say of the quantized layers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from dashq.data import StoredLayer
from dashq.model.mixtures import linear_modules
from dashq.results.report import LayerReport
from dashq.runtime.quantizer import FORMAT_VERSION, QUANT_METHOD
from dashq.strategies import Serializer


def stored_layer(report: LayerReport, serializer: Serializer) -> StoredLayer:
    """The form that the layer of a report has in its checkpoint."""
    grid = serializer.grid(report.bits)
    return StoredLayer(layer=report.layer, grid=grid, size=report.group_size, ordered=report.ordered)


def format_settings(
    serializer: Serializer, layers: Sequence[StoredLayer], network: PreTrainedModel
) -> Mapping[str, Mapping[str, Any]]:
    """The entries for JSON files beside the tensors, by the files' names; those of `config.json` are added to it."""
    quantized = {stored.layer.name for stored in layers}
    unquantized = [name for name, _ in linear_modules(network) if name not in quantized]
    entries = serializer.describe(layers, unquantized, network.config)
    if entries is None:
        entries = {"config.json": {"quantization_config": quantization_config(serializer, layers)}}
    return entries


def quantization_config(serializer: Serializer, layers: Iterable[StoredLayer]) -> dict[str, Any]:
    """The entry of `config.json` for results that only dashq opens, enough to build layers before a tensor is read."""
    entries = {
        stored.layer.name: {"bits": stored.grid.bits, "size": stored.size}
        | ({"ordered": True} if stored.ordered else {})
        for stored in layers
    }
    return {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "serializer": serializer.model_dump(mode="json"),
        "layers": entries,
    }
