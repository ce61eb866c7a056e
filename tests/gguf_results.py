"""GGUF files for tests to share: one of every family."""

import json
from pathlib import Path
from typing import Any

import gguf
import transformers
from transformers import PretrainedConfig

from dashq import Recipe
from dashq_plugins.formats.gguf.metadata import add_metadata
from dashq_plugins.formats.gguf.names import layout_of
from pico import EVEN, FACTORS, HYBRID, IN_GGUF, SHARING, SMALL
from pico import FAMILIES as MODELS
from recipes import build_recipe, small_scheme

SIZES: dict[str, Any] = EVEN | {"initializer_range": 0.1}
LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PHI: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0 + index for index in range(8)],
    "short_factor": [1.0 + index / 8 for index in range(8)],
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
SHARED: dict[str, Any] = {  # the second half of the layers have no keys of their own
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
}
WINDOWS: dict[str, Any] = {
    "sliding_window": 16,
    "layer_types": [kind for _ in range(16) for kind in [*["sliding_attention"] * 3, "full_attention"]],
}
ALIKE: dict[str, Any] = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "final_logit_softcapping": 20.0}
CHOSEN: dict[str, Any] = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
LINEAR: dict[str, Any] = {name: value for name, value in SHARING.items() if name != "head_dim"}
GRANITE_4: dict[str, Any] = HYBRID | FACTORS | {"layer_types": ["linear_attention", "full_attention"]}
TURNED: dict[str, Any] = {"position_embedding_type": "rope"}
DENSE: dict[str, Any] = {"num_local_experts": 0}
ATTENDING: dict[str, Any] = {"layer_types": ["full_attention"] * 2}
BLOCKS = ["linear_attention", "moe", "full_attention", "moe"]
# With 32 inside, a token lies so near to two experts that rounded inputs choose the other one.
NEMOTRON: dict[str, Any] = {"mamba_num_heads": 8, "layers_block_type": BLOCKS, "moe_intermediate_size": 64}
NEMOTRON_DENSE = NEMOTRON | {"layers_block_type": [kind.replace("moe", "mlp") for kind in BLOCKS]}
FOUR = ("cohere2", "olmo3", "exaone_moe", "afmoe", "llama4")  # of which every fourth layer is unlike the others
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LONG | {"original_max_position_embeddings": 8192}}),
    "llama-untied-biased": ("llama-untied-biased", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 16}),
    "gemma3-linear": (
        "gemma3",
        {
            "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    # With 32 inside, a token lies so near to two experts that rounded inputs choose the other one.
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [], "norm_topk_prob": False, "moe_intermediate_size": 64}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "phi3": ("phi3", {}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "gpt_oss": ("gpt_oss", {"rope_parameters": YARN}),
    "gemma4-shared": ("gemma4", SHARED),
    "gemma4-mixture": ("gemma4", ALIKE | CHOSEN),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "lfm2-adjusted": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": True, "block_multiple_of": 32},
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_inner": 96, "n_layer": 2}),
    "bloom": ("bloom", {"n_layer": 2, "seq_length": 256}),
    "gpt_neox": ("gpt_neox", {}),
    "llama4-interleaved": ("llama4", {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}),
    "hunyuan-grown": (
        "hunyuan_v1_dense",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    ),
    "lfm2_moe": ("lfm2_moe", {"layer_types": ["conv", "full_attention"]}),
    "qwen3_next": ("qwen3_next", LINEAR),
    "granite4": ("granitemoehybrid", GRANITE_4),
    "granite4-turned": ("granitemoehybrid", GRANITE_4 | TURNED),
    "granite4-dense": ("granitemoehybrid", GRANITE_4 | DENSE),
    "granite4-attending": ("granitemoehybrid", GRANITE_4 | TURNED | ATTENDING),
    "granite4-attending-dense": ("granitemoehybrid", GRANITE_4 | TURNED | ATTENDING | DENSE),
    "bamba": ("bamba", HYBRID | {"attn_layer_indices": [1]}),
    "jamba": ("jamba", {"mamba_dt_rank": 32, "attn_layer_period": 2}),
    "nemotron_h": ("nemotron_h", NEMOTRON),
    "nemotron_h-dense": ("nemotron_h", NEMOTRON_DENSE),
    **{name: (name, {"num_hidden_layers": 4}) for name in FOUR},
    **{name: (name, {}) for name in IN_GGUF if name not in ("smollm3", "gemma3n", *FOUR)},
}
SINGLE: dict[str, Any] = {"intermediate_size": 128, "time_step_rank": 32}
MAMBA_2: dict[str, Any] = {"num_heads": 8, "n_groups": 2}
MULTIPLIED: dict[str, Any] = {
    "embedding_multiplier": 5.65,
    "lm_head_multiplier": 0.2,
    "mlp_multipliers": [0.88, 0.58],
    "key_multiplier": 0.39,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.93,
    "ssm_multipliers": [0.35, 0.25, 0.4, 0.5, 0.35],
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.23,
}
NORMED: dict[str, Any] = {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "tie_word_embeddings": True}
FAMILIES |= {
    "mamba": ("mamba", SINGLE),
    "falcon_mamba": ("falcon_mamba", SINGLE),
    "falcon_mamba-eps": ("falcon_mamba", SINGLE | {"mixer_rms_eps": 1e-6}),
    "mamba2": ("mamba2", MAMBA_2),
    "falcon_h1": ("falcon_h1", MULTIPLIED),
    "falcon_h1-plain": ("falcon_h1", NORMED),
    "falcon_h1-normed": ("falcon_h1", MULTIPLIED | NORMED),
}
SHARING_KEYS: dict[str, Any] = {  # the smaller published Gemma 3n, of which the last third has no keys of its own
    "num_hidden_layers": 30,
    "num_kv_shared_layers": 10,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 6,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
    "intermediate_size": 992,
}
KIMI: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "linear_num_heads": 4,
    "linear_head_dim": 32,
}
FAMILIES |= {
    # With few columns inside, what is 0 depends on whether squares are divided by their number or by one less.
    "gemma3n": ("gemma3n", {"hidden_size": 32, "intermediate_size": 2016}),
    "kimi_linear": ("kimi_linear", KIMI),
    "helium": ("helium", {}),
}
LATENT: dict[str, Any] = {"q_lora_rank": 32, "kv_lora_rank": 32, "num_key_value_heads": 4}
SCALED = YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}
FAMILIES |= {
    "deepseek_v2": ("deepseek_v2", LATENT | {"topk_method": "greedy", "rope_parameters": SCALED}),
    "deepseek_v2-lite": ("deepseek_v2", LATENT | {"q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT | {"n_routed_experts": 8, "rope_parameters": SCALED | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", LATENT),
    "youtu": ("youtu", LATENT),
    "minicpm3": ("minicpm3", LATENT),
}
SCHEME = small_scheme(32, bits=4, router="routed")
FORMAT = {"name": "gguf", "four_bits": "Q4_1"}


def recipe(model: Path, output: Path, **changes: Any) -> Recipe:
    """A recipe that writes a GGUF file of 4 bits."""
    usual: dict[str, Any] = {"scheme": SCHEME, "serializer": FORMAT}
    source = (model / "config.json" if model.is_dir() else model).read_bytes()
    if b"kv_lora_rank" in source and b"minicpm3" not in source:
        usual["overrides"] = [{"match": ".*kv_b_proj", "skip": True}]
    if b"altup" in source:
        usual["overrides"] = [{"match": ".*coefs", "skip": True}]  # of four columns
    return build_recipe(model, output, **(usual | changes))


def fields(folder: Path) -> dict[str, Any]:
    """What the file of a result says of its model."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {name: field.contents() for name, field in reader.fields.items()}


def unknown_pre_tokenizer(model: Path) -> None:
    """Give a model's tokenizer a pre-tokenizer that llama.cpp has no name for."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(content))


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model."""
    name, own = (MODELS | IN_GGUF)[family]
    config: PretrainedConfig = getattr(transformers, name)(**(SMALL | own | SIZES | changes))
    return config


def read(folder: Path, config: PretrainedConfig) -> gguf.GGUFReader:
    """A file that holds the metadata alone."""
    layout = layout_of(config)
    folder.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", layout.architecture)
    add_metadata(writer, layout)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(folder / "model.gguf")


def said(folder: Path, config: PretrainedConfig) -> dict[str, Any]:
    """The entries of that file, without the architecture's name in front."""
    fields = {name: field.contents() for name, field in read(folder, config).fields.items()}
    architecture = fields["general.architecture"]
    return {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}
