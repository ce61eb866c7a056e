"""Latent attention in GGUF files: what heads make keys and values from, and how its mixtures choose experts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dashq import PlanError, StoredLayer
from dashq.model.gguf_layout import GgufLayout
from dashq_plugins.formats.gguf.layers import shares_latents

if TYPE_CHECKING:
    import gguf
    import transformers

LATENT = ("deepseek2", "minicpm3", "kimi-linear")  # architectures
GREEDY = "greedy"  # DeepSeek V2 then chooses among all experts, whatever its groups
# Numbers of layers at which llama.cpp makes queries in one step, and one with that of tokens.
LITE = (26, 27)
LITE_WITH_TOKENS = (48, 128256)


def check_latent(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than this configuration says."""
    config = layout.config
    if not getattr(config, "rope_interleave", True):
        raise PlanError(
            f"llama.cpp turns neighbouring columns in {layout.architecture}, and this model those half a head apart"
        )
    if layout.architecture == "minicpm3":
        if config.q_lora_rank is None:
            raise PlanError("llama.cpp makes queries in two steps in minicpm3, and this model in one")
    elif config.q_lora_rank is not None and _is_lite(config):
        raise PlanError(
            f"llama.cpp makes queries in one step where {layout.architecture} has {config.num_hidden_layers} layers "
            f"and {config.vocab_size} tokens, and this model in two"
        )
    if config.model_type == "deepseek_v2":
        _check_router(config)


def refuse_turned_keys(layout: GgufLayout, layers: Sequence[StoredLayer]) -> None:
    """Refuse quantized rows of keys and values where llama.cpp wants the keys column by column."""
    names = [stored.layer.name for stored in layers if layout.turns_keys(f"{stored.layer.name}.weight")]
    if names:
        raise PlanError(
            f"{names[0]}: llama.cpp wants the keys of this matrix column by column, so that its cache need not "
            "hold them, and rows that are quantized cannot be turned. To leave it as it is, add an override that "
            "matches it with `skip: true`: `{match: '.*kv_b_proj', skip: true}`"
        )


def _is_lite(config: "transformers.PretrainedConfig") -> bool:
    layers = config.num_hidden_layers
    return layers in LITE or (layers, config.vocab_size) == LITE_WITH_TOKENS


def _check_router(config: "transformers.PretrainedConfig") -> None:
    """Refuse how DeepSeek V2 chooses experts where llama.cpp does as DeepSeek V3."""
    if config.norm_topk_prob:
        raise PlanError(
            "transformers never lets the weights of a token's experts add up to 1 in deepseek_v2, and here they should"
        )
    if _chooses_groups(config):
        raise PlanError("llama.cpp chooses groups of experts by their two best, and this model by their best")


def _chooses_groups(config: "transformers.PretrainedConfig") -> bool:
    """True where experts of some groups alone can be chosen for a token."""
    groups = getattr(config, "n_group", None) or 1
    return groups > 1 and config.topk_group < groups and getattr(config, "topk_method", "") != GREEDY


def add_latent(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    """Write the sizes of latents and heads, and how experts are chosen."""
    import gguf

    writer.add_q_lora_rank(config.q_lora_rank or 0)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    if not shares_latents(config):
        return
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    if not hasattr(config, "n_routed_experts"):  # llama.cpp asks for these of all
        writer.add_leading_dense_block_count(config.num_hidden_layers)
        writer.add_expert_feed_forward_length(config.intermediate_size)
        writer.add_expert_shared_count(0)
        return
    kind = gguf.ExpertGatingFuncType
    writer.add_expert_gating_func(kind.SOFTMAX if config.model_type == "deepseek_v2" else kind.SIGMOID)
    writer.add_expert_weights_norm(bool(config.norm_topk_prob))
    if _chooses_groups(config):
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
