"""Sliding windows in a GGUF file: the layers that have one, and the context in which llama.cpp agrees."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout

if TYPE_CHECKING:
    import gguf
    import transformers

# Those that are told which layers see no further than a window.
WINDOWS = {"gemma2", "gemma3", "gemma3n", "mimo2", "gemma4", "olmo2", "exaone-moe", "afmoe"}
# Those in which llama.cpp takes for granted that all layers have a window but every second, or every fourth.
PERIODS = {"gpt-oss": 2, "cohere2": 4, "exaone4": 4, "afmoe": 4}
EXAONE_LAYERS = 64  # of the one model of exaone4 that has windows in llama.cpp
CONTEXTS = {"mpt": "max_seq_len", "bloom": "seq_length"}  # model types with a word of their own
BLOOM_CONTEXT = 2048  # of a configuration without it
NO_CONTEXT = 2**20  # of models that do not attend, and have no bound


def check_windows(layout: GgufLayout) -> None:
    """Raise a `PlanError` for windows where llama.cpp has none, and the other way round."""
    slides = [kind == "sliding_attention" for kind in _kinds(layout.config)]
    if layout.architecture in PERIODS:
        _check_period(layout, slides)
    if layout.architecture in WINDOWS and not any(slides):
        raise PlanError(
            f"llama.cpp wants layers with a window in {layout.architecture}, and no layer of this model has one"
        )


def _check_period(layout: GgufLayout, slides: Sequence[bool]) -> None:
    """Refuse windows of other layers than every one but each whose number the period divides."""
    config, period = layout.config, PERIODS[layout.architecture]
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


def add_window(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    """Write the width of windows, the layers that have one, and how long a text may be."""
    config: transformers.PretrainedConfig = layout.config
    usual = BLOOM_CONTEXT if config.model_type == "bloom" else NO_CONTEXT
    context: int = getattr(config, CONTEXTS.get(config.model_type, "max_position_embeddings"), None) or usual
    window: int = getattr(config, "sliding_window", None) or 0
    if layout.architecture in WINDOWS and hasattr(config, "layer_types"):
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if "sliding_attention" in config.rope_parameters:
            writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    elif window and layout.architecture in PERIODS:
        writer.add_sliding_window(window)
    elif window and "sliding_attention" in _kinds(config):
        context = min(context, window)  # llama.cpp has no window in this architecture: it agrees so far
    writer.add_context_length(context)


def _kinds(config: "transformers.PretrainedConfig") -> Sequence[str]:
    """The kind of attention of each layer: a window in all where a configuration does not say it."""
    return getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
