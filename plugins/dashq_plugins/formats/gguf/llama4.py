"""Settings of Llama 4 that llama.cpp takes for granted: the layers that see chunks of a text, experts, and norms."""

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout

PERIOD = 4  # every fourth layer sees all of a text, and turns nothing
UNNORMED = 128  # the number of experts of the one model whose queries and keys have no norm


def check_llama4(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than this configuration of Llama 4 says."""
    config = layout.config
    if config.num_hidden_layers < PERIOD:
        raise PlanError(f"llama.cpp computes no llama4 of less than {PERIOD} layers, of which one sees all of a text")
    near = [(index + 1) % PERIOD != 0 for index in range(config.num_hidden_layers)]
    chunks = [kind == "chunked_attention" for kind in config.layer_types]
    if chunks != near or [bool(turns) for turns in config.no_rope_layers] != near:
        raise PlanError(
            f"llama.cpp lets all layers of llama4 but every {PERIOD}th see chunks of a text and turn queries and keys, "
            "and this model others"
        )
    step = config.interleave_moe_layer_step
    if list(config.moe_layers) != list(range(step - 1, config.num_hidden_layers, step)):
        raise PlanError(
            f"llama.cpp has experts in every layer of llama4 whose number interleave_moe_layer_step = {step} divides, "
            f"and this model in those of moe_layers = {config.moe_layers}"
        )
    if config.use_qk_norm != (config.num_local_experts != UNNORMED):
        raise PlanError(
            f"llama.cpp norms queries and keys of llama4 where there are other than {UNNORMED} experts, and here "
            f"use_qk_norm is {config.use_qk_norm} with {config.num_local_experts}"
        )
