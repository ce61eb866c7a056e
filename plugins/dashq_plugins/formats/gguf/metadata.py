"""The metadata of a GGUF file about a model's shape, from the configuration of transformers."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy

from dashq import PlanError
from dashq_plugins.formats.gguf.names import Names

if TYPE_CHECKING:
    import gguf
    import transformers


def check_config(names: Names) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than the configuration says."""
    config, rope = names.config, _rope(names.config)
    if (kind := rope.get("rope_type", "default")) not in ("default", "linear", "llama3"):
        raise PlanError(f"cannot write rotary embeddings of type {kind!r} to a GGUF file")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PlanError("cannot write rotary embeddings of a part of each head to a GGUF file")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != names.activation:
        raise PlanError(f"llama.cpp computes {names.activation} in {names.architecture}, and this model {activation}")
    if not getattr(config, "norm_topk_prob", True):
        raise PlanError("llama.cpp lets the weights of a token's experts add up to 1, and this model does not")
    # llama.cpp recognizes Gemma 3 27B by its 62 layers, and divides its queries by the root of another width.
    width = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else _head_size(config)
    if (scalar := getattr(config, "query_pre_attn_scalar", width)) != width:
        raise PlanError(f"llama.cpp divides queries by the root of {width}, and this model by that of {scalar}")


def add_metadata(writer: "gguf.GGUFWriter", names: Names, file_type: int) -> None:
    """Write all that llama.cpp has to know to compute as the model does."""
    import gguf

    config = names.config
    size = _head_size(config)
    # Only the folder's own name: those above it are the user's.
    writer.add_name(PurePath(getattr(config, "name_or_path", "")).name or config.model_type)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        )
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    _add_window(writer, names)
    _add_rope(writer, _rope(config), size)


def _add_window(writer: "gguf.GGUFWriter", names: Names) -> None:
    config = names.config
    context: int = config.max_position_embeddings
    window: int = getattr(config, "sliding_window", None) or 0
    if names.architecture == "gemma3":
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    elif window:
        context = min(context, window)  # llama.cpp has no window in this architecture: it agrees so far
    writer.add_context_length(context)


def _add_rope(writer: "gguf.GGUFWriter", rope: Mapping[str, Any], size: int) -> None:
    import gguf

    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, size))


def _rope(config: "transformers.PretrainedConfig") -> Mapping[str, Any]:
    """The parameters of the rotary embeddings, of global layers where there are others."""
    parameters: Mapping[str, Any] = config.rope_parameters
    rope: Mapping[str, Any] = parameters.get("full_attention", parameters)
    return rope


def _head_size(config: "transformers.PretrainedConfig") -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _llama3_factors(rope: Mapping[str, Any], size: int) -> numpy.ndarray[Any, numpy.dtype[numpy.float32]]:
    """The factor by which each rotary frequency is slowed down: 1, the whole factor, or in between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    factors = []
    for index in range(0, size, 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (index / size))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return numpy.array(factors, dtype=numpy.float32)
