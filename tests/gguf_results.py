"""GGUF files for tests to share: one of every family."""

import json
from pathlib import Path
from typing import Any

import gguf

from dashq import Recipe
from pico import EVEN, IN_GGUF
from recipes import build_recipe, small_scheme

SIZES: dict[str, Any] = EVEN | {"initializer_range": 0.1}
LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PHI: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "long_factor": [1.0 + index for index in range(8)],
    "short_factor": [1.0 + index / 8 for index in range(8)],
}
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
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [], "norm_topk_prob": False}),
    "olmoe": ("olmoe", {"num_key_value_heads": 4}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "phi3": ("phi3", {}),
    **{name: (name, {}) for name in IN_GGUF if name != "smollm3"},
}
SCHEME = small_scheme(32, bits=4, router="routed")
FORMAT = {"name": "gguf", "four_bits": "Q4_1"}


def recipe(model: Path, output: Path, **changes: Any) -> Recipe:
    """A recipe that writes a GGUF file of 4 bits."""
    usual: dict[str, Any] = {"scheme": SCHEME, "serializer": FORMAT}
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
