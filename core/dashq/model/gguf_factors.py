"""Factors of Falcon-H1 for which llama.cpp has no entries: those that parameters hold in a file, in float32."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

if TYPE_CHECKING:
    import transformers

EMBEDDINGS = "embed_tokens.weight"


def stream_unit(config: "transformers.PretrainedConfig") -> float:
    """The factor of all hidden states between layers in llama.cpp.

    A norm before a feed-forward network holds the factor of its gate, which its other matrix is given too; so what the
    network adds is too large by that, and lacks the factor of its own.
    """
    gate, down = config.mlp_multipliers
    return float(gate / down)


def embedding_factor(config: "transformers.PretrainedConfig") -> float:
    """The factor of embeddings in the file."""
    return float(config.embedding_multiplier) * stream_unit(config)


def held(
    config: "transformers.PretrainedConfig", parameter: str, tensor: Shaped[Tensor, "rows *others"], back: bool
) -> Shaped[Tensor, "rows *others"]:
    """A parameter with the factors that it holds in the file, or `back` without them.

    Embeddings in bfloat16 are float16 there, which is as large and more exact.
    """
    if parameter.endswith(EMBEDDINGS):
        factor = embedding_factor(config)
        if factor == 1:
            return tensor
        kind = torch.float16 if tensor.dtype == torch.bfloat16 else torch.float32
        return tensor.float() / factor if back else (tensor.float() * factor).to(kind)
    if parameter.endswith("pre_ff_layernorm.weight"):
        factors = torch.tensor(float(config.mlp_multipliers[0]))
    elif parameter.endswith("final_layernorm.weight"):
        lower = embedding_factor(config) if config.tie_word_embeddings else 1.0
        factors = torch.tensor(float(config.lm_head_multiplier) / lower)
    elif parameter.endswith(".conv1d.weight"):
        factors = _of_filters(config).view(-1, *[1] * (tensor.dim() - 1)).to(tensor.device)
    else:
        return tensor
    return tensor.float() / factors if back else tensor.float() * factors


def _of_filters(config: "transformers.PretrainedConfig") -> Float[Tensor, " channels"]:
    """The factors of what filters are given, beside that of gates, which the matrix before them has as a whole."""
    gates, values, keys, queries, _ = config.ssm_multipliers
    width, state = config.mamba_n_heads * config.mamba_d_head, config.mamba_n_groups * config.mamba_d_state
    parts = [torch.full((width,), values), torch.full((state,), keys), torch.full((state,), queries)]
    factors: Tensor = torch.cat(parts) / gates
    return factors
