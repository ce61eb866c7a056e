"""The metadata of a GGUF file about a model's shape, from the configuration of transformers."""

from pathlib import PurePath
from typing import TYPE_CHECKING

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout
from dashq_plugins.formats.gguf.gemma4 import add_gemma4, check_gemma4
from dashq_plugins.formats.gguf.layers import head_size, heads_of_keys, inner_size
from dashq_plugins.formats.gguf.names import FAMILIES
from dashq_plugins.formats.gguf.rotary import add_rope, check_rope

if TYPE_CHECKING:
    import gguf
    import transformers


WINDOWS = {"gemma2", "gemma3", "gemma4"}  # those that are told which layers see no further than a window
# Those in which llama.cpp takes for granted that all layers have a window but every second, or every fourth.
PERIODS = {"gpt-oss": 2, "cohere2": 4, "exaone4": 4}
EXAONE_LAYERS = 64  # of the one model of exaone4 that has windows in llama.cpp
# Attributes of configurations, and the writer's words for them.
SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "num_experts_per_tok": "expert_used_count",
    "top_k_experts": "expert_used_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "use_parallel_residual": "parallel_residual",
    "conv_L_cache": "shortconv_l_cache",
}
LAYER_NORMS = ("layer_norm_eps", "norm_epsilon", "norm_eps")  # of norms that take the mean away, by their names
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
NO_ROPE_STEP = 4  # every fourth layer of SmolLM3 turns nothing
# The setting that gives an architecture biases for which llama.cpp has no place there.
BIASES = {"ernie4_5": "use_bias", "command-r": "attention_bias", "cohere2": "attention_bias", "lfm2": "conv_bias"}
GPT_OSS = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # what llama.cpp takes for granted there


def check_config(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than the configuration says."""
    config, family = layout.config, FAMILIES[layout.config.model_type]
    check_rope(layout)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", family.activation)
    if activation != family.activation:
        raise PlanError(f"llama.cpp computes {family.activation} in {family.architecture}, and this model {activation}")
    if getattr(config, "norm_topk_prob", family.normalizes) != family.normalizes:
        does, other = ("lets", "does not") if family.normalizes else ("does not let", "does")
        raise PlanError(f"llama.cpp {does} the weights of a token's experts add up to 1, and this model {other}")
    # llama.cpp recognizes Gemma 2 and 3 27B by their layers, and divides their queries by the root of another width.
    largest = (layout.architecture, config.num_hidden_layers) in (("gemma2", 46), ("gemma3", 62))
    width = config.hidden_size // config.num_attention_heads if largest else head_size(config)
    if (scalar := getattr(config, "query_pre_attn_scalar", width)) != width:
        raise PlanError(f"llama.cpp divides queries by the root of {width}, and this model by that of {scalar}")
    if layout.architecture in PERIODS:
        _check_windows(layout)
    _check_own(layout)


def _check_windows(layout: GgufLayout) -> None:
    """Refuse layers with windows where llama.cpp has none, and the other way round."""
    config, period = layout.config, PERIODS[layout.architecture]
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if layout.architecture == "exaone4" and config.num_hidden_layers != EXAONE_LAYERS:
        if any(slides) or config.sliding_window:
            raise PlanError(
                f"llama.cpp has windows in exaone4 where there are {EXAONE_LAYERS} layers, and nowhere else"
            )
    elif slides != [(index + 1) % period != 0 for index in range(config.num_hidden_layers)]:
        raise PlanError(
            f"llama.cpp gives all layers of {layout.architecture} a window but each whose number {period} divides, and "
            "this model others"
        )


def _check_own(layout: GgufLayout) -> None:
    """Refuse what llama.cpp takes for granted, or has no place for, in one architecture."""
    config = layout.config
    if layout.architecture == "smollm3":
        turned = [int((index + 1) % NO_ROPE_STEP != 0) for index in range(config.num_hidden_layers)]
        if list(config.no_rope_layers) != turned:
            raise PlanError(f"llama.cpp turns all layers of smollm3 but every {NO_ROPE_STEP}th, and this model others")
    if layout.architecture == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise PlanError("llama.cpp wants as many heads of keys as of queries in olmoe, and this model has fewer")
    if getattr(config, "qk_layernorm", False) or (layout.architecture == "command-r" and config.use_qk_norm):
        raise PlanError("cannot write norms of queries and keys of each head to a GGUF file")
    if layout.architecture == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        raise PlanError("llama.cpp caps the logits, and those of attention, in gemma2, and this model does not")
    if getattr(config, setting := BIASES.get(layout.architecture, ""), False):
        raise PlanError(f"llama.cpp has no place for the biases of {layout.architecture}, which {setting} gives it")
    if layout.architecture == "gemma4":
        check_gemma4(config)
    if layout.architecture == "glm4moe" and config.n_group != 1:
        raise PlanError(f"llama.cpp chooses among all experts in glm4moe, and this model in {config.n_group} groups")
    if layout.architecture == "gpt-oss":
        for name, value in GPT_OSS.items():
            if (own := getattr(config, name, value)) != value:
                raise PlanError(f"llama.cpp computes gpt-oss with {name} = {value}, and here it is {own}")


def add_metadata(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    """Write all that llama.cpp has to know to compute as the model does."""
    config = layout.config
    size = head_size(config)
    # Only the folder's own name: those above it are the user's.
    writer.add_name(PurePath(getattr(config, "name_or_path", "")).name or config.model_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner_size(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(heads_of_keys(config))
    writer.add_key_length(size)
    writer.add_value_length(size)
    _add_norms(writer, layout)
    if experts := next((count for name in EXPERTS if (count := getattr(config, name, None))), None):
        writer.add_expert_count(experts)
        writer.add_expert_feed_forward_length(
            getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        )
    for name, word in SCALES.items():
        if (value := getattr(config, name, None)) is not None:
            getattr(writer, f"add_{word}")(value)
    if layout.architecture == "glm4moe":
        _add_glm4_moe(writer)
    if layout.architecture == "gemma4":
        add_gemma4(writer, config)
    if layout.architecture == "qwen3vl":
        writer.add_num_deepstack_layers(len(config.deepstack_visual_indexes))
    _add_window(writer, layout)
    add_rope(writer, layout)


def _add_norms(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    config = layout.config
    if layout.architecture == "lfm2":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    elif hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(next(getattr(config, name) for name in LAYER_NORMS if hasattr(config, name)))


def _add_glm4_moe(writer: "gguf.GGUFWriter") -> None:
    """Write how experts are chosen; transformers reads no layers that predict further tokens."""
    import gguf

    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(True)
    writer.add_nextn_predict_layers(0)


def _add_window(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    config: transformers.PretrainedConfig = layout.config
    context: int = config.max_position_embeddings
    window: int = getattr(config, "sliding_window", None) or 0
    if layout.architecture in WINDOWS:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if "sliding_attention" in config.rope_parameters:
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    elif window and layout.architecture in PERIODS:
        writer.add_sliding_window(window)
    elif window:
        context = min(context, window)  # llama.cpp has no window in this architecture: it agrees so far
    writer.add_context_length(context)
