"""Settings that llama.cpp takes for granted of Gemma 3n, and tensors that it asks for and does not use."""

from typing import TYPE_CHECKING

import numpy

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout

if TYPE_CHECKING:
    import gguf
    import transformers

OWN_KEYS = 20  # layers behind these take the keys of the last of these that has a window as they have
SPARSE, KEPT = 10, 0.95  # the first layers, and the share of activations that is 0 there
# llama.cpp divides by one less for the deviation behind which activations count: a half of that share more.
COLUMNS = 768


def check_gemma3n(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than this configuration of Gemma 3n says."""
    config = layout.config
    count = config.num_hidden_layers
    if (own := count - config.num_kv_shared_layers) != min(count, OWN_KEYS):
        raise PlanError(
            f"llama.cpp gives the first {OWN_KEYS} layers of gemma3n keys of their own, and this model {own}"
        )
    if count > own and config.layer_types[own - 2 : own] != ["sliding_attention", "full_attention"]:
        raise PlanError(
            f"llama.cpp lets layers without keys take those of the last two with keys, one with a window and then one "
            f"without, and in this model these are {config.layer_types[own - 2 : own]}"
        )
    sparse = [KEPT if index < SPARSE else 0.0 for index in range(count)]
    if list(config.activation_sparsity_pattern) != sparse:
        raise PlanError(
            f"llama.cpp sets {KEPT:.0%} of the activations to 0 in the first {SPARSE} layers of gemma3n, and in no "
            f"other, and this model has activation_sparsity_pattern = {config.activation_sparsity_pattern}"
        )
    if (inner := min(config.intermediate_size)) < COLUMNS:
        raise PlanError(
            "llama.cpp estimates how far activations deviate from their mean otherwise, by too much for less than "
            f"{COLUMNS} columns, and this model has intermediate_size = {inner}"
        )
    if len({*config.intermediate_size}) > 1:
        raise PlanError(
            "llama.cpp wants the same intermediate_size in all layers of gemma3n, and this model has "
            f"{config.intermediate_size}"
        )


def add_gemma3n(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    """Write keys and values of the layers that take those of others, which llama.cpp does not load a file without."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind := gguf.GGMLQuantizationType.Q4_0]
    rows = config.num_key_value_heads * config.head_dim
    for layer in range(config.num_hidden_layers - config.num_kv_shared_layers, config.num_hidden_layers):
        for name in ("attn_k", "attn_v"):
            zeros = numpy.zeros((rows, config.hidden_size // block * size), dtype=numpy.uint8)
            writer.add_tensor(f"blk.{layer}.{name}.weight", zeros, raw_dtype=kind)
        writer.add_tensor(f"blk.{layer}.attn_k_norm.weight", numpy.ones(config.head_dim, dtype=numpy.float32))
