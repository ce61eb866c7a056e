"""The models that are written as GGUF files from what transformers knows of them, and the tensors there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dashq import PlanError
from dashq.model.gguf_layout import ARCHITECTURES, GgufLayout

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class Family:
    """An architecture, its activation in llama.cpp, and whether the weights of chosen experts add up to 1 there.

    `seeing` is the architecture where tokens of images have three positions, `attending` that where all layers attend,
    without experts and with them.
    """

    architecture: str
    activation: str = "silu"
    normalizes: bool = True
    seeing: str = ""
    attending: Sequence[str] = ()


# By the model type of transformers: those that llama.cpp was seen to compute as transformers does.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama"),
    "mistral": Family("llama"),
    "ministral3": Family("mistral3"),
    "mixtral": Family("llama"),
    "qwen2": Family("qwen2", seeing="qwen2vl"),
    "qwen2_moe": Family("qwen2moe", normalizes=False),
    "qwen3": Family("qwen3", seeing="qwen3vl"),
    "qwen3_moe": Family("qwen3moe"),
    "gemma": Family("gemma", "gelu_pytorch_tanh"),
    "gemma2": Family("gemma2", "gelu_pytorch_tanh"),
    "gemma3_text": Family("gemma3", "gelu_pytorch_tanh"),
    "gemma4_text": Family("gemma4", "gelu_pytorch_tanh"),
    "gemma4_unified_text": Family("gemma4", "gelu_pytorch_tanh"),
    "phi3": Family("phi3"),
    "granite": Family("granite"),
    "smollm3": Family("smollm3"),
    "olmo2": Family("olmo2"),
    "olmoe": Family("olmoe", normalizes=False),
    "gpt_oss": Family("gpt-oss"),
    "seed_oss": Family("seed_oss"),
    "starcoder2": Family("starcoder2", "gelu_pytorch_tanh"),
    "stablelm": Family("stablelm"),
    "nemotron": Family("nemotron", "relu2"),
    "arcee": Family("arcee", "relu2"),
    "glm4": Family("glm4"),
    "glm4_moe": Family("glm4moe"),
    "ernie4_5": Family("ernie4_5"),
    "exaone4": Family("exaone4"),
    "cohere": Family("command-r"),
    "cohere2": Family("cohere2"),
    "phi": Family("phi2", "gelu_new"),
    "lfm2": Family("lfm2"),
    "lfm2_moe": Family("lfm2moe"),
    "olmo": Family("olmo"),
    "olmo3": Family("olmo2"),
    "granitemoe": Family("granitemoe"),
    "granitemoeshared": Family("granitemoe"),
    "ernie4_5_moe": Family("ernie4_5-moe"),
    "dots1": Family("dots1"),
    "hunyuan_v1_dense": Family("hunyuan-dense"),
    "hunyuan_v1_moe": Family("hunyuan-moe"),
    "jais2": Family("jais2", "relu2"),
    "minimax_m2": Family("minimax-m2"),
    "glm": Family("chatglm"),
    "exaone_moe": Family("exaone-moe"),
    "afmoe": Family("afmoe"),
    "internlm3": Family("llama"),
    "solar_open": Family("glm4moe"),
    "gpt2": Family("gpt2", "gelu_new"),
    "gpt_bigcode": Family("starcoder", "gelu_pytorch_tanh"),
    "gpt_neox": Family("gptneox", "gelu"),
    "bloom": Family("bloom"),
    "falcon": Family("falcon", "gelu"),
    "mpt": Family("mpt"),
    "deepseek_v2": Family("deepseek2"),
    "deepseek_v3": Family("deepseek2"),
    "glm4_moe_lite": Family("deepseek2"),
    "youtu": Family("deepseek2"),
    "minicpm3": Family("minicpm3"),
    "granitemoehybrid": Family("granitehybrid", attending=("granite", "granitemoe")),
    "bamba": Family("granitehybrid"),
    "jamba": Family("jamba", normalizes=False),
    "nemotron_h": Family("nemotron_h", "relu2"),
    "qwen3_next": Family("qwen3next"),
    "qwen3_5_text": Family("qwen35"),
    "qwen3_5_moe_text": Family("qwen35moe"),
    "llama4_text": Family("llama4"),
    "cwm": Family("llama"),
    "ministral": Family("llama"),
    "iquestcoder": Family("llama"),
    "apertus": Family("apertus", "xielu"),
    "mimo_v2_flash": Family("mimo2"),
    "gemma3n_text": Family("gemma3n", "gelu_pytorch_tanh"),
    "helium": Family("llama"),
    "kimi_linear": Family("kimi-linear"),
    "falcon_h1": Family("falcon-h1"),
    "mamba": Family("mamba"),
    "mamba2": Family("mamba2"),
    "falcon_mamba": Family("mamba"),
}


TOWERS = (
    "llama.cpp takes images and sounds through an mmproj file of the original model, which its converter makes "
    "(`convert_hf_to_gguf.py FOLDER --mmproj`)"
)
# By the model type of those that are one of these and towers for images or sounds: where llama.cpp has the towers.
TEXT_ALONE: Mapping[str, str] = {
    "gemma3": TOWERS,
    "gemma3n": TOWERS,
    "gemma4": TOWERS,
    "gemma4_unified": TOWERS,
    "llama4": TOWERS,
    "mistral3": TOWERS,
    "qwen2_vl": TOWERS,
    "qwen2_5_vl": TOWERS,
    "qwen3_vl": TOWERS,
    "qwen3_5": TOWERS,
    "qwen3_5_moe": TOWERS,
    "llava": f"{TOWERS} where its tower is Pixtral's; for a tower of CLIP's llama.cpp has scripts in "
    "`tools/mtmd/legacy-models`",
}


def layout_of(config: "transformers.PretrainedConfig") -> GgufLayout:
    """The layout of a file that is written from this configuration; a `PlanError` where its type cannot be written."""
    if config.model_type in TEXT_ALONE:
        raise PlanError(
            f"a GGUF file holds the text model of {config.model_type!r} alone: a run reads that from the original, "
            "`dashq run MODEL --for llama.cpp`"
        )
    if config.model_type not in FAMILIES:
        raise PlanError(
            f"cannot write GGUF files of model type {config.model_type!r} from safetensors, only of "
            f"{', '.join(FAMILIES)}. Let llama.cpp make the file, `convert_hf_to_gguf.py FOLDER --outfile "
            f"model.gguf`, and quantize that, where it is of one of these architectures: {', '.join(ARCHITECTURES)}"
        )
    family = FAMILIES[config.model_type]
    sees = family.seeing and getattr(config, "mrope_section", None)
    if family.attending and "linear_attention" not in config.layer_types:
        dense, mixture = family.attending
        return GgufLayout(mixture if config.num_local_experts else dense, config)
    if family.architecture == "nemotron_h" and "moe" in config.layer_types:
        return GgufLayout("nemotron_h_moe", config)
    return GgufLayout(family.seeing if sees else family.architecture, config)


def in_file(layout: GgufLayout, name: str) -> Sequence[str]:
    """The file's names of a tensor of transformers; a `PlanError` for one that the file has no place for."""
    if not (names := layout.names(name)):
        raise PlanError(f"GGUF's {layout.architecture} has no place for the tensor {name}")
    return names


def place(name: str) -> tuple[str, int | None]:
    """The tensor that holds one of ours: that of its name, or a stack, of experts or others, and the number in it."""
    stack, _, number = name.removesuffix(".weight").rpartition(".")
    return (stack, int(number)) if number.isdecimal() else (name, None)
