"""Settings beside the tensors: what `config.json` and the files of a format say of the quantized layers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from dashq.data import StoredLayer
from dashq.model.mixtures import linear_modules
from dashq.model.transformers_internals import tied_weights
from dashq.results.report import LayerReport
from dashq.runtime.quantizer import FORMAT_VERSION, QUANT_METHOD, WEIGHTS_ENTRY
from dashq.strategies import Serializer


def stored_layer(report: LayerReport, serializer: Serializer) -> StoredLayer:
    """The form that the layer of a report has in its checkpoint."""
    grid = serializer.grid_of(report.bits, report.type)
    return StoredLayer(layer=report.layer, grid=grid, size=report.group_size, ordered=report.ordered)


def format_settings(
    serializer: Serializer, layers: Sequence[StoredLayer], network: PreTrainedModel
) -> Mapping[str, Mapping[str, Any]]:
    """The entries for JSON files beside the tensors, by the files' names; those of `config.json` are added to it."""
    quantized = {stored.layer.name for stored in layers}
    tied = {name for name, other in tied_weights(network).items() if other.removesuffix(".weight") in quantized}
    unquantized = [
        name for name, _ in linear_modules(network) if name not in quantized and f"{name}.weight" not in tied
    ]
    entries = serializer.describe(layers, unquantized, network.config)
    if entries is None:
        entries = {"config.json": {"quantization_config": quantization_config(serializer, layers)}}
    own = entries.get("config.json", {})
    if note := _note_for_transformers(serializer, own, network.config):
        entries = {**entries, "config.json": {**own, WEIGHTS_ENTRY: note}}
    return entries


def _note_for_transformers(serializer: Serializer, own: Mapping[str, Any], config: PretrainedConfig) -> str | None:
    """The sentence that stands in the place of a file's name where transformers does not read the packed weights.

    It would open them all the same, and make the weights up at random: it sees no `quant_method`, or warns of one that
    it does not know. A name that is none of a safetensors file it refuses, and shows.
    """
    container = serializer.container(config)
    if container and not container.file.endswith(".safetensors"):
        return None  # there is no file that transformers would take
    if "quantization_config" not in own:
        return f"this model is packed in the format {serializer.name}, for programs that its README.md names"
    if own["quantization_config"].get("quant_method") == QUANT_METHOD:
        return "this model is packed by dashq, `import dashq` before you open it"
    return None


def quantization_config(serializer: Serializer, layers: Iterable[StoredLayer]) -> dict[str, Any]:
    """The entry of `config.json` for results that only dashq opens, enough to build layers before a tensor is read."""
    entries = {
        stored.layer.name: {"bits": stored.grid.bits, "size": stored.size}
        | ({"ordered": True} if stored.ordered else {})
        | ({"type": name} if (name := serializer.name_of(stored.grid)) else {})
        for stored in layers
    }
    return {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "serializer": serializer.model_dump(mode="json"),
        "layers": entries,
    }
