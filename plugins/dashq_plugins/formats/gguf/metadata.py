"""The metadata of a GGUF file about a model's shape, from the configuration of transformers."""

import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout
from dashq_plugins.formats.gguf.names import FAMILIES

if TYPE_CHECKING:
    import gguf
    import transformers


PARTIAL = {"phi3", "stablelm", "nemotron"}  # architectures that turn a part of each head
LONG = {"phi3"}  # those with factors for long texts and others for short ones
WINDOWS = {"gemma2", "gemma3"}  # those in which llama.cpp knows that some layers see no further than a window
# Attributes of configurations, and the writer's words for them.
SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "num_experts_per_tok": "expert_used_count",
    "use_parallel_residual": "parallel_residual",
}
LAYER_NORMS = ("layer_norm_eps", "norm_epsilon", "norm_eps")  # of norms that take the mean away, by their names
NO_ROPE_STEP = 4  # every fourth layer of SmolLM3 turns nothing


def check_config(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than the configuration says."""
    config, rope, family = layout.config, _rope(layout.config), FAMILIES[layout.config.model_type]
    kinds = ("default", "linear", "llama3", *(("longrope",) if layout.architecture in LONG else ()))
    if (kind := rope.get("rope_type", "default")) not in kinds:
        raise PlanError(f"cannot write rotary embeddings of type {kind!r} to a GGUF file of {layout.architecture}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and layout.architecture not in PARTIAL:
        raise PlanError("cannot write rotary embeddings of a part of each head to a GGUF file")
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise PlanError(f"llama.cpp computes {family.activation} in {family.architecture}, and this model {activation}")
    if getattr(config, "norm_topk_prob", family.normalizes) != family.normalizes:
        does, other = ("lets", "does not") if family.normalizes else ("does not let", "does")
        raise PlanError(f"llama.cpp {does} the weights of a token's experts add up to 1, and this model {other}")
    # llama.cpp recognizes Gemma 2 and 3 27B by their layers, and divides their queries by the root of another width.
    largest = (layout.architecture, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62))
    width = config.hidden_size // config.num_attention_heads if largest else _head_size(config)
    if (scalar := getattr(config, "query_pre_attn_scalar", width)) != width:
        raise PlanError(f"llama.cpp divides queries by the root of {width}, and this model by that of {scalar}")
    if layout.architecture == "smollm3":
        turned = [int((index + 1) % NO_ROPE_STEP != 0) for index in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != turned:
            raise PlanError(f"llama.cpp turns all layers of smollm3 but every {NO_ROPE_STEP}th, and this model others")
    if layout.architecture == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise PlanError("llama.cpp wants as many heads of keys as of queries in olmoe, and this model has fewer")
    if getattr(config, "qk_layernorm", False):
        raise PlanError("cannot write norms of queries and keys of each head to a GGUF file")


def add_metadata(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    """Write all that llama.cpp has to know to compute as the model does."""
    config = layout.config
    size = _head_size(config)
    # Only the folder's own name: those above it are the user's.
    writer.add_name(PurePath(getattr(config, "name_or_path", "")).name or config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(next(getattr(config, name) for name in LAYER_NORMS if hasattr(config, name)))
    if experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_feed_forward_length(
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        )
    for name, word in SCALES.items():
        if (value := getattr(config, name, None)) is not None:
            getattr(writer, f"add_{word}")(value)
    _add_window(writer, layout)
    _add_rope(writer, config, size)


def _add_window(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    config = layout.config
    context: int = config.max_position_embeddings
    window: int = getattr(config, "sliding_window", None) or 0
    if layout.architecture in WINDOWS:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if "sliding_attention" in config.rope_parameters:
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    elif window:
        context = min(context, window)  # llama.cpp has no window in this architecture: it agrees so far
    writer.add_context_length(context)


def _add_rope(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig", size: int) -> None:
    import gguf

    rope = _rope(config)
    turned = int(size * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(turned)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, size))
    elif kind == "longrope":
        _add_factors(writer, config, rope)


def _add_factors(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig", rope: Mapping[str, Any]) -> None:
    """Write the factors that slow each frequency down in long and in short texts, and that of what they turn."""
    from dashq.model.transformers_internals import rotary_frequencies  # it imports transformers

    _, turned = rotary_frequencies("longrope", config)
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_attn_factors(turned)
    for length in ("long", "short"):
        factors = numpy.array(rope[f"{length}_factor"], dtype=numpy.float32)
        writer.add_tensor(f"rope_factors_{length}.weight", factors)


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
