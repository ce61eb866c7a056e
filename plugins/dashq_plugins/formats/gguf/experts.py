"""Experts in the configurations of models, which have several names for how many there are, and in which layers."""

from typing import TYPE_CHECKING, Any

from dashq.model.gguf_layout import GgufLayout

if TYPE_CHECKING:
    import transformers

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")  # beside those, and as wide
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")


def expert_count(layout: GgufLayout) -> Any:
    """The number of experts, or a list of those in each layer; None where no layer has any."""
    count = _first(layout.config, EXPERTS)
    # Nemotron-H counts experts that no layer has, and Jamba calls one expert what is none.
    return None if layout.architecture == "nemotron_h" or (layout.architecture == "jamba" and count == 1) else count


def shared_expert_count(config: "transformers.PretrainedConfig") -> int:
    """The number of experts that all tokens have."""
    return _first(config, SHARED) or 0


def leading_layers(config: "transformers.PretrainedConfig") -> int | None:
    """The number of layers before the first one with experts; None where the configuration has no word for it."""
    if kinds := getattr(config, "mlp_layer_types", None):
        return [*kinds, "sparse"].index("sparse")
    return next((getattr(config, name) for name in LEADING if hasattr(config, name)), None)


def _first(config: "transformers.PretrainedConfig", names: tuple[str, ...]) -> Any:
    """The first of some settings that the configuration has, and that is not 0."""
    return next((value for name in names if (value := getattr(config, name, None))), None)
