"""The loss of a model's predictions when one of its layers alone is quantized, measured on the whole model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from dashq.data import Quantized
from dashq.measuring.analysis import Analysis
from dashq.model.decoder import block_matrices


def confirm(
    analysis: Analysis,
    network: PreTrainedModel,
    blocks: Sequence[str],
    quantized: Mapping[str, Quantized],
    windows: Int64[Tensor, "windows context"],
    listen: Callable[[int], None] = lambda done: None,
) -> Analysis:
    """The analysis with the divergence of every layer beside its sensitivity, and how well their ranks agree.

    `network` is the whole model, with decoder blocks of these names; `quantized` are the first choices of its layers.
    """
    measured = divergences(network, blocks, quantized, windows, listen)
    layers = tuple(layer.model_copy(update={"divergence": measured[layer.name]}) for layer in analysis.layers)
    expected = [layer.choices[0].sensitivity for layer in layers]
    correlation = rank_correlation(expected, [measured[layer.name] for layer in layers])
    return analysis.model_copy(update={"layers": layers, "rank_correlation": correlation})


@torch.inference_mode()
def divergences(
    network: PreTrainedModel,
    blocks: Sequence[str],
    quantized: Mapping[str, Quantized],
    windows: Int64[Tensor, "windows context"],
    listen: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Σ p (log p - log p̂) by layer, in nats per token, with p̂ predicted where that layer alone is quantized."""
    expected = _predictions(network, windows)
    weights = {}
    for block_name in blocks:
        block = network.get_submodule(block_name)
        for name, matrix in block_matrices(block).items():
            weights[f"{block_name}.{name}"] = matrix.of(block.get_parameter(matrix.parameter).data)
    weights |= {name: network.get_parameter(f"{name}.weight").data for name in quantized if name not in weights}
    losses: dict[str, float] = {}
    for name, weight in weights.items():
        if (layer := quantized.get(name)) is not None:
            original = weight.clone()
            weight.copy_(layer.dequantize())
            predicted = _predictions(network, windows)
            weight.copy_(original)
            lost = functional.kl_div(predicted, expected, reduction="none", log_target=True).sum(-1)
            losses[name] = float(lost.mean())
            listen(len(losses))
    return losses


def _predictions(
    network: PreTrainedModel, windows: Int64[Tensor, "windows context"]
) -> Float[Tensor, "windows context words"]:
    """log p of every word behind every token."""
    logits = [network(window.to(network.device), use_cache=False).logits for window in windows.split(1)]
    return torch.cat(logits).float().log_softmax(-1)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's, with mean ranks for equal values; None where all values are equal, or there is only one."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    result: Any = spearmanr(x, y)  # its annotations hide what it holds
    return float(result.statistic)
