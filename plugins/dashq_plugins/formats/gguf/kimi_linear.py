"""Kimi Linear in GGUF files: its linear attention, beside latent attention that turns nothing."""

from typing import TYPE_CHECKING

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout

if TYPE_CHECKING:
    import gguf
    import transformers

BOTH = {"linear_attention", "full_attention"}


def check_kimi_linear(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than this configuration of Kimi Linear says."""
    config = layout.config
    if {*config.layer_types} != BOTH:
        raise PlanError(
            "llama.cpp wants layers with linear attention and others that attend to all in kimi-linear, and this model "
            f"has {', '.join(dict.fromkeys(config.layer_types))}"
        )
    if config.linear_num_heads != config.num_attention_heads:
        raise PlanError(
            f"llama.cpp has as many heads in all layers of kimi-linear, and this model {config.linear_num_heads} of "
            f"linear attention and {config.num_attention_heads} others"
        )
    if config.q_lora_rank is not None:
        raise PlanError("llama.cpp makes queries in one step in kimi-linear, and this model in two")
    if config.n_group != 1:
        raise PlanError(
            f"llama.cpp chooses among all experts in kimi-linear, and this model in {config.n_group} groups"
        )
    if not config.norm_topk_prob:
        raise PlanError("llama.cpp lets the weights of a token's experts add up to 1, and this model does not")


def add_kimi_linear(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    """Write the sizes of linear attention, and the columns of keys that all heads share."""
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_kda_head_dim(config.linear_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)  # which nothing turns
