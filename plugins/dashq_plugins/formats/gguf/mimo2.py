"""MiMo-V2 in GGUF files: the factor of its values, and the part of each head that turns."""

from typing import TYPE_CHECKING

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout

if TYPE_CHECKING:
    import gguf
    import transformers


def check_mimo2(layout: GgufLayout) -> None:
    """Raise a `PlanError` where llama.cpp computes something else than this configuration of MiMo-V2 says."""
    config = layout.config
    ropes = [config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention")]
    far, near = (rope.get("partial_rotary_factor") for rope in ropes)  # without it transformers has one of its own
    if far is None or near != far:
        raise PlanError(
            "llama.cpp turns the same part of each head in all layers of mimo2, and in this model "
            f"partial_rotary_factor is {far} without a window and {near} with one"
        )


def add_mimo2(writer: "gguf.GGUFWriter", config: "transformers.PretrainedConfig") -> None:
    """Write the factor that values have in attention, where they have one."""
    if config.attention_value_scale is not None:
        writer.add_float32("mimo2.attention.value_scale", config.attention_value_scale)
