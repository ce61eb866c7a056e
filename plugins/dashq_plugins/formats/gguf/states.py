"""Entries of a GGUF file about layers with states, and what llama.cpp computes otherwise there."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dashq import PlanError, StoredLayer
from dashq.model.gguf_layout import GgufLayout
from dashq.model.gguf_states import TILED
from dashq_plugins.formats.gguf.blocks import type_of

if TYPE_CHECKING:
    import gguf
    import transformers

LINEAR = {"qwen3next", "qwen35", "qwen35moe"}  # those with linear attention
ATTENDING = {"granite", "granitemoe"}  # those of Granite 4 where all layers attend
MAMBA = {"granitehybrid", "jamba", "nemotron_h", "nemotron_h_moe"}  # those of Mamba and attention
BOTH = {"linear_attention", "full_attention"}  # layers of those
HAVING = {"linear_attention", "hybrid"}  # layers that have states, in Falcon-H1 beside attention
WITHOUT_HEADS = {"mamba"}  # those whose states have no heads
STATES = LINEAR | ATTENDING | MAMBA | WITHOUT_HEADS  # those that are checked here
SHORTEST = 0.001  # of Nemotron-H's steps, as published: decision 109 says how far llama.cpp is from it
_LINEAR = ("conv_kernel_dim", "key_head_dim", "num_key_heads", "num_value_heads", "value_head_dim")
_MAMBA = ("d_conv", "d_state", "n_groups", "n_heads", "d_head")
# By model types, what they call the length of filters, the size of a state, the number of groups that share its inputs,
# that of heads, and the size of each.
SIZES: Mapping[str, Sequence[str]] = {
    **{kind: [f"linear_{name}" for name in _LINEAR] for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    **{kind: [f"mamba_{name}" for name in _MAMBA] for kind in ("granitemoehybrid", "bamba")},
    "falcon_h1": [f"mamba_{name}" for name in _MAMBA],
    "mamba2": ("conv_kernel", "state_size", "n_groups", "num_heads", "head_dim"),
    "nemotron_h": ("conv_kernel", "ssm_state_size", "n_groups", "mamba_num_heads", "mamba_head_dim"),
}


def check_states(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than the configuration says."""
    config = layout.config
    if layout.architecture in ATTENDING and getattr(config, "position_embedding_type", "rope") != "rope":
        raise PlanError(f"llama.cpp turns heads in {layout.architecture}, and this model does not")
    if config.model_type == "nemotron_h" and config.time_step_min > SHORTEST:
        raise PlanError(
            f"llama.cpp lets steps be of any length in {layout.architecture}, and this model none shorter than "
            f"{config.time_step_min}"
        )
    if layout.architecture in MAMBA and not {*config.layer_types} >= BOTH:
        raise PlanError(
            f"llama.cpp wants layers with states and others that attend in {layout.architecture}, and this model has "
            f"{', '.join(dict.fromkeys(config.layer_types))}"
        )
    if layout.architecture in WITHOUT_HEADS and config.intermediate_size != 2 * config.hidden_size:
        raise PlanError(
            f"llama.cpp has twice as many columns inside layers of {layout.architecture} as outside, and this model "
            f"{config.intermediate_size} and {config.hidden_size}"
        )
    if layout.architecture == "nemotron_h_moe" and "mlp" in config.layer_types:
        raise PlanError("llama.cpp has experts in all feed-forward networks of nemotron_h_moe, and this model in some")
    if layout.architecture not in LINEAR:
        return
    if config.layer_types != _kinds(config) or len({*config.layer_types}) == 1:
        raise PlanError(
            f"llama.cpp has linear attention in all layers of {layout.architecture} but each whose number one number "
            "divides, and this model in others"
        )
    if config.linear_key_head_dim != config.linear_value_head_dim:
        raise PlanError(
            f"llama.cpp has keys and values of one size in the linear attention of {layout.architecture}, and this "
            f"model keys of {config.linear_key_head_dim} and values of {config.linear_value_head_dim}"
        )


def check_columns(layout: GgufLayout, layers: Sequence[StoredLayer]) -> None:
    """Raise a `PlanError` where a block would hold columns of heads that lie elsewhere in the file."""
    config = layout.config
    if layout.architecture not in TILED or config.linear_num_key_heads == config.linear_num_value_heads:
        return
    size = config.linear_value_head_dim
    for stored in layers:
        kind = type_of(stored.grid)
        if stored.layer.name.endswith("linear_attn.out_proj") and size % kind.columns:
            raise PlanError(
                f"{stored.layer.name}: a GGUF file of {layout.architecture} has the heads of {size} columns in another "
                f"order, and {kind.name} has blocks of {kind.columns}; types with blocks of 32, such as IQ4_NL, Q4_1, "
                "Q5_1 and Q8_0, fit"
            )


def add_states(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    """Write the sizes of states, of the filters before them, and which layers have them."""
    config = layout.config
    if layout.architecture == "granitehybrid":
        writer.add_rope_scaling_finetuned(getattr(config, "position_embedding_type", "rope") == "rope")
    if config.model_type == "jamba":
        writer.add_ssm_conv_kernel(config.mamba_d_conv)
        writer.add_ssm_state_size(config.mamba_d_state)
        writer.add_ssm_time_step_rank(config.mamba_dt_rank)
        writer.add_ssm_inner_size(config.mamba_expand * config.hidden_size)
    if layout.architecture in WITHOUT_HEADS:
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_ssm_inner_size(config.intermediate_size)
        writer.add_ssm_dt_b_c_rms(config.model_type == "falcon_mamba")
    if config.model_type not in SIZES or not {*config.layer_types} & HAVING:
        return
    filters, state, groups, heads, size = (getattr(config, name) for name in SIZES[config.model_type])
    writer.add_ssm_conv_kernel(filters)
    writer.add_ssm_state_size(state)
    writer.add_ssm_group_count(groups)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_inner_size(heads * size)
    if layout.architecture in LINEAR:
        writer.add_full_attention_interval(_interval(config))
    if config.model_type == "nemotron_h":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)  # which llama.cpp wants, and does not take
    if getattr(config, "moe_latent_size", None) is not None:
        writer.add_moe_latent_size(config.moe_latent_size)


def _interval(config: "transformers.PretrainedConfig") -> int:
    """The number of the first layer with full attention, of 1 and up; behind all layers where none has."""
    return [*config.layer_types, "full_attention"].index("full_attention") + 1


def _kinds(config: "transformers.PretrainedConfig") -> Sequence[str]:
    """The layers as llama.cpp has them: every one that the interval divides attends to all of a text."""
    interval = _interval(config)
    numbers = range(1, config.num_hidden_layers + 1)
    return ["linear_attention" if number % interval else "full_attention" for number in numbers]
