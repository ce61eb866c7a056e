"""Falcon-H1 in GGUF files: its factors, as scales of matrices where llama.cpp multiplies with those."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from dashq import PlanError, StoredLayer
from dashq.model.gguf_factors import embedding_factor, stream_unit
from dashq.model.gguf_layout import GgufLayout

if TYPE_CHECKING:
    import gguf
    import transformers


def check_falcon_h1(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than this configuration of Falcon-H1 says."""
    config = layout.config
    gates, *_, steps = config.ssm_multipliers
    if gates != steps:
        raise PlanError(
            "llama.cpp has one factor for gates and steps of falcon-h1, and here ssm_multipliers begins with "
            f"{gates} and ends with {steps}"
        )
    if config.mamba_rms_norm and config.mamba_norm_before_gate:
        raise PlanError("llama.cpp norms states of falcon-h1 behind their gates, and this model before them")


def refuse_packed_embeddings(layout: GgufLayout, layers: Sequence[StoredLayer]) -> None:
    """Refuse quantized embeddings of Falcon-H1 that hold a factor: their scales would be multiplied and rounded."""
    if layout.architecture != "falcon-h1" or (factor := embedding_factor(layout.config)) == 1:
        return
    for stored in layers:
        if stored.layer.name.endswith("embed_tokens"):
            raise PlanError(
                f"{stored.layer.name}: embeddings of falcon-h1 hold the factor {factor:g} in a GGUF file, which scales "
                "of quantized ones cannot hold exactly. Leave `embeddings` out"
            )


def add_falcon_h1(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    """Write the factors of matrices as their scales, and none that is 1."""
    unit, attends = stream_unit(config), config.attention_in_multiplier
    scales = {
        "attn_q": attends,
        "attn_k": attends * config.key_multiplier,
        "attn_v": attends,
        "attn_output": config.attention_out_multiplier * unit,
        "ssm_in": config.ssm_in_multiplier * config.ssm_multipliers[0],
        "ssm_out": config.ssm_out_multiplier * unit,
    }
    for name, scale in scales.items():
        for layer in range(config.num_hidden_layers if scale != 1 else 0):
            writer.add_tensor(f"blk.{layer}.{name}.scale", numpy.array([scale], dtype=numpy.float32))
