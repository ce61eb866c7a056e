"""What a model's predictions really lose when one of its layers alone is quantized."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from dashq.data import Quantized
from dashq.measuring.sensitivity import Analysis
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
    found = divergences(network, blocks, quantized, windows, listen)
    layers = tuple(layer.model_copy(update={"divergence": found[layer.name]}) for layer in analysis.layers)
    pairs = torch.tensor([[layer.choices[0].sensitivity, found[layer.name]] for layer in layers], dtype=torch.float64)
    return analysis.model_copy(update={"layers": layers, "rank_correlation": rank_correlation(*pairs.T)})


@torch.inference_mode()
def divergences(
    network: PreTrainedModel,
    blocks: Sequence[str],
    quantized: Mapping[str, Quantized],
    windows: Int64[Tensor, "windows context"],
    listen: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """By layer, Σ p (log p - log p̂) in nats per token, p̂ predicted with that layer alone quantized."""
    expected = _predictions(network, windows)
    found: dict[str, float] = {}
    for block_name in blocks:
        block = network.get_submodule(block_name)
        for name, matrix in block_matrices(block).items():
            if (layer := quantized.get(f"{block_name}.{name}")) is not None:
                weight = matrix.of(block.get_parameter(matrix.parameter).data)
                original = weight.clone()
                weight.copy_(layer.dequantize())
                lost = (expected.exp() * (expected - _predictions(network, windows))).sum(-1)
                weight.copy_(original)
                found[f"{block_name}.{name}"] = float(lost.mean())
                listen(len(found))
    return found


def _predictions(
    network: PreTrainedModel, windows: Int64[Tensor, "windows context"]
) -> Float[Tensor, "windows context words"]:
    logits = [network(window.to(network.device), use_cache=False).logits for window in windows.split(1)]
    return torch.cat(logits).float().log_softmax(-1)


def rank_correlation(x: Float[Tensor, " values"], y: Float[Tensor, " values"]) -> float | None:
    """Spearman's; None where there is nothing to correlate."""
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1]) if len(x) > 1 else None
