"""Entries of a GGUF file that Gemma 4 alone has: of windows' heads, shared keys, and inputs of each layer."""

from typing import TYPE_CHECKING

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout

if TYPE_CHECKING:
    import gguf
    import transformers


def check_gemma4(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than this configuration of Gemma 4 says."""
    config = layout.config
    own = config.num_hidden_layers - config.num_kv_shared_layers
    if config.num_kv_shared_layers and config.layer_types[own - 2 : own] != ["sliding_attention", "full_attention"]:
        raise PlanError(
            "llama.cpp lets layers without keys take those of the last two with keys, one with a window and then one "
            f"without, and in this model these are {config.layer_types[own - 2 : own]}"
        )
    if config.use_bidirectional_attention == "all":
        raise PlanError("llama.cpp lets tokens see those before them alone in gemma4, and this model all")
    if getattr(config, "hidden_size_per_layer_input", 0) and config.vocab_size_per_layer_input != config.vocab_size:
        raise PlanError("llama.cpp wants inputs of each layer for all tokens in gemma4, and this model has fewer")


def add_gemma4(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    """Write the entries of Gemma 4 alone: what is said of heads elsewhere is of those without a window."""
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(getattr(config, "hidden_size_per_layer_input", 0) or 0)
    if config.final_logit_softcapping is None:
        writer.add_final_logit_softcapping(0.0)  # else llama.cpp takes the one of the published models
    size = config.per_layer_config[config.layer_types.index("sliding_attention")].head_dim
    writer.add_key_length_swa(size)
    writer.add_value_length_swa(size)
    writer.add_rope_dimension_count_swa(size)
