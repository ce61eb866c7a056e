"""The bytes of a model before and after, by what holds them."""

from collections.abc import Iterable
from dataclasses import dataclass

from dashq.data import Layer
from dashq.model.decoder import Model
from dashq.model.transformers_internals import tied_weights
from dashq.results.report import Report

ALIKE = 0.02  # by which all that is not quantized may differ in bytes, where it is taken to be as it was


@dataclass(frozen=True)
class Part:
    """Something in a model that holds bytes: how many it did before, where that is known, and does now."""

    name: str
    before: int | None
    after: int


def original_bytes(model: Model, layers: Iterable[Layer]) -> dict[str, int]:
    """The bytes of the weights of these layers as their files hold them, of embeddings, head, and all others."""
    network, tied = model.network, tied_weights(model.network)
    quantized = {f"{layer.name}.weight": layer.weights * network.dtype.itemsize for layer in layers}
    outer = {"embeddings": network.get_input_embeddings(), "head": network.get_output_embeddings()}
    sizes = {"layers": sum(quantized.values()), "embeddings": 0, "head": 0, "others": -sum(quantized.values())}
    for name, parameter in network.named_parameters():
        if name not in tied:
            places = [part for part, module in outer.items() if parameter is getattr(module, "weight", None)]
            part = places[0] if places and name not in quantized else "others"
            sizes[part] += parameter.numel() * parameter.element_size()
    return sizes


def parts(report: Report) -> list[Part]:
    """The parts of a result, those that hold nothing left out; what is not quantized is one where it was rewritten."""
    codes = sum(layer.bits * layer.rows * layer.columns for layer in report.layers) // 8
    packed = sum(layer.bytes for layer in report.layers)
    kept = report.totals.bytes_on_disk - packed
    before = dict(report.original)
    quantized = [Part("codes of quantized layers", before.pop("layers", None), codes)]
    quantized.append(Part("their scales and offsets", None, packed - codes))
    if before and abs(sum(before.values()) - kept) <= ALIKE * kept + 2**16:  # files have headers besides
        sizes = {"embeddings": "embeddings", "head": "head", "others": "norms and others"}
        rest = [Part(word, before[part], before[part]) for part, word in sizes.items() if before.get(part)]
    else:
        rest = [Part("not quantized", sum(before.values()) or None, kept)]
    return [part for part in (*quantized, *rest) if part.after or part.before]
