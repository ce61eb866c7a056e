"""Tiny random models that take images as well, for tests to share."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, PretrainedConfig

from pico import IN_GGUF, SMALL, pico_tokenizer, vary_vectors

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# More layers than the decoder, and more weights.
TOWER = transformers.SiglipVisionConfig(**VISION, num_hidden_layers=20)


def seeing_model(config: PretrainedConfig, folder: Path) -> Path:
    """Save a model of this configuration, with the tokenizer, in `folder`; returns the folder."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    vary_vectors(model)
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text('{"do_resize": true}\r\n')
    return folder


def gemma3(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
    text = transformers.Gemma3TextConfig(**(own | sizes))
    tokens: dict[str, Any] = {"image_token_id": 300, "boi_token_id": 301, "eoi_token_id": 302, "mm_tokens_per_image": 4}
    return seeing_model(transformers.Gemma3Config(text_config=text, vision_config=TOWER, **tokens), folder)


def gemma4(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, **IN_GGUF["gemma4"][1]}
    text = transformers.Gemma4TextConfig(**(own | sizes))
    vision = transformers.Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    return seeing_model(transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None), folder)


def text_model_alone(model: Path, folder: Path) -> Path:
    """Save the text model of one that also takes images, as transformers holds it, in `folder`; returns the folder."""
    whole: Any = AutoModelForImageTextToText.from_pretrained(model)
    config = whole.config.text_config
    alone: Any = transformers.AutoModelForCausalLM.from_config(config)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder
