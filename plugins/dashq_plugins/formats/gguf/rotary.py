"""Rotary embeddings in the metadata of a GGUF file, and the tables of factors that some have."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy

from dashq import PlanError
from dashq.model.gguf_layout import GgufLayout
from dashq_plugins.formats.gguf.layers import head_size

if TYPE_CHECKING:
    import gguf
    import transformers

# Those that turn a part of each head.
PARTIAL = {
    "phi2",
    "phi3",
    "stablelm",
    "nemotron",
    "gemma4",
    "glm4",
    "glm4moe",
    "chatglm",
    "minimax-m2",
    "gptneox",
    "qwen3next",
    "qwen35",
    "qwen35moe",
    "granitehybrid",
    "mimo2",
}
WHOLE = {"granitemoehybrid"}  # model types of these that turn all of a head, whatever their configuration says
# A type that few architectures have: factors for long texts and others for short ones, frequencies of which the last
# are 0, and those of Llama 3.1, of which llama.cpp reads a table.
OWN = {
    "phi3": "longrope",
    "gemma4": "proportional",
    "minicpm3": "longrope",
    **dict.fromkeys(("llama", "llama4", "apertus", "arcee", "exaone4", "exaone-moe"), "llama3"),
    **dict.fromkeys(("granite", "granitemoe", "granitehybrid"), "llama3"),
}
# Those in which dynamic embeddings may have an `alpha`, by which their base is larger in texts of any length.
GROWN = {"hunyuan-dense", "hunyuan-moe"}
# The types that all others have. Dynamic embeddings are the default ones in texts of up to the model's context, which
# is that of the file.
USUAL = ("default", "dynamic", "linear", "yarn")
FEWER = {"mistral3": ("yarn",), "deepseek2": ("default", "yarn"), "minicpm3": ("default",)}
# The setting by which queries grow in texts longer than the original context.
GROWING = {"mistral3": "llama_4_scaling_beta"}
SCALED = {"deepseek2"}  # those in which YaRN scales all of attention, not what turns alone
ONE_BASE = {"olmo2"}  # that have windows, and take no base of their own for layers with one
# That have a position for each of some sections of a head's columns, by what they are where nothing is said.
SECTIONED = {"qwen2vl": (), "qwen3vl": (), "qwen35": (11, 11, 10), "qwen35moe": (11, 11, 10)}
STANDSTILL = 1e30  # a factor that slows a frequency down so far that it turns nothing
YARN = {"beta_fast": 32, "beta_slow": 1}  # what llama.cpp takes for granted
# Those whose ramp of YaRN does not begin and end at whole frequencies, as it does in llama.cpp: decision 98.
APPROXIMATE = {"gpt-oss"}


def check_rope(layout: GgufLayout) -> None:
    """Raise a `PlanError` for rotary embeddings that llama.cpp would compute otherwise."""
    rope = _rope(layout.config)
    kinds = (*FEWER.get(layout.architecture, USUAL), OWN.get(layout.architecture))
    if (kind := rope.get("rope_type", "default")) not in kinds:
        raise PlanError(f"cannot write rotary embeddings of type {kind!r} to a GGUF file of {layout.architecture}")
    whole = layout.architecture not in PARTIAL or layout.config.model_type in WHOLE
    if whole and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PlanError("cannot write rotary embeddings of a part of each head to a GGUF file")
    windows = getattr(layout.config, "rope_parameters", {}).get("sliding_attention", {})
    if (other := windows.get("rope_type", "default")) not in ("default", "dynamic"):
        raise PlanError(f"cannot write rotary embeddings of type {other!r} in layers with a window to a GGUF file")
    base = rope.get("rope_theta")
    if layout.architecture in ONE_BASE and (own := windows.get("rope_theta", base)) != base:
        raise PlanError(
            f"llama.cpp turns all layers of {layout.architecture} by one base, and this model those with a window by "
            f"{own} and others by {base}"
        )
    if kind == "yarn":
        _check_yarn(layout, rope)


def _check_yarn(layout: GgufLayout, rope: Mapping[str, Any]) -> None:
    from dashq.model.transformers_internals import rotary_frequencies  # it imports transformers

    for name, value in YARN.items():
        if (own := rope.get(name) or value) != value:
            raise PlanError(f"llama.cpp computes YaRN with {name} = {value}, and here it is {own}")
    if not rope.get("truncate", True) and layout.architecture not in APPROXIMATE:
        raise PlanError("llama.cpp lets the ramp of YaRN begin and end at whole frequencies, and this model does not")
    _, grown = rotary_frequencies("yarn", layout.config)
    if layout.architecture in SCALED:
        if grown != 1 or not rope.get("mscale_all_dim"):
            raise PlanError(
                f"llama.cpp computes YaRN in {layout.architecture} where mscale and mscale_all_dim are the same, and "
                f"here they are {rope.get('mscale')} and {rope.get('mscale_all_dim')}"
            )
        return
    growth = 0.1 * math.log(rope["factor"])
    expected = (growth + 1) / (growth * _divisor(layout, rope) + 1)
    if not math.isclose(grown, expected, rel_tol=1e-6):
        raise PlanError(f"llama.cpp lets what YaRN turns grow by {expected:.4f} at this factor, and here it is {grown}")


def _divisor(layout: GgufLayout, rope: Mapping[str, Any]) -> float:
    """The share of YaRN's growth that is divided out again, in those architectures that have an entry for it."""
    return float(rope.get("mscale_all_dim") or 0.0) if layout.architecture in GROWING else 0.0


def add_rope(writer: "gguf.GGUFWriter", layout: GgufLayout) -> None:
    """Write the frequencies of rotary embeddings, how many of a head's columns they turn, and how they are scaled."""
    import gguf

    config = layout.config
    rope = _rope(config)
    if not rope:
        return
    size = head_size(config)
    kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(size if kind == "proportional" else int(size * share))
    alpha = rope.get("alpha") if kind == "dynamic" and layout.architecture in GROWN else None
    growth = alpha ** (size / (size - 2)) if alpha else 1.0
    writer.add_rope_freq_base(rope["rope_theta"] * growth)
    if layout.architecture in SECTIONED:
        usual = getattr(config, "mrope_section", SECTIONED[layout.architecture])
        writer.add_rope_dimension_sections([*rope.get("mrope_section", usual), 0])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if layout.architecture in SCALED:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])  # llama.cpp wants a tenth
        if layout.architecture in GROWING:
            writer.add_rope_scaling_yarn_log_mul(_divisor(layout, rope))
            writer.add_attn_temperature_scale(rope[GROWING[layout.architecture]])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, size))
    elif kind == "proportional":
        turned = numpy.arange(size // 2) < int(share * size // 2)
        writer.add_tensor("rope_freqs.weight", numpy.where(turned, 1, STANDSTILL).astype(numpy.float32))
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
    """The parameters of the rotary embeddings, of global layers where there are others; none where nothing turns."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", {})
    rope: Mapping[str, Any] = parameters.get("full_attention", parameters)
    return rope


def _llama3_factors(rope: Mapping[str, Any], size: int) -> numpy.ndarray[Any, numpy.dtype[numpy.float32]]:
    """The factor by which each rotary frequency is slowed down: 1, the whole factor, or in between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    factors = []
    for index in range(0, size, 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (index / size))
        # Llama 4 has one factor for both, where nothing lies in between.
        share = float(turns >= low) if low == high else min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return numpy.array(factors, dtype=numpy.float32)
