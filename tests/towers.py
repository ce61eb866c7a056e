"""Tiny random models that take images as well, for tests to share."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from dashq.model.transformers_internals import tied_weights
from pico import FAMILIES, IN_GGUF, SMALL, pico_tokenizer, vary_vectors

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS: dict[str, Any] = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
SECTIONS: dict[str, Any] = {
    "rms_norm_eps": 1e-12,  # llama.cpp reads none in `qwen2vl`: decision 103
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
}
INTERLEAVED: dict[str, Any] = {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [3, 3, 2],
        "mrope_interleaved": True,
    },
}
TOWER_OF_QWEN: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 16,
}
# Text models that transformers has no language model for, and those that are the same without images.
SAME_WITH_TEXT = {
    "qwen2_vl_text": transformers.Qwen2Config,
    "qwen2_5_vl_text": transformers.Qwen2Config,
    "qwen3_vl_text": transformers.Qwen3Config,
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


def gemma4_unified(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, **IN_GGUF["gemma4_unified"][1]}
    text = transformers.Gemma4UnifiedTextConfig(**(own | sizes))
    vision = transformers.Gemma4UnifiedVisionConfig(mm_embed_dim=32, mm_posemb_size=16, output_proj_dims=32)
    config = transformers.Gemma4UnifiedConfig(text_config=text, vision_config=vision, audio_config=None)
    return seeing_model(config, folder)


def llava(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL}
    text = transformers.Qwen2Config(**(own | sizes))
    return seeing_model(transformers.LlavaConfig(text_config=text, vision_config=TOWER, image_token_index=300), folder)


def mistral3(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, "head_dim": 16, "sliding_window": None}
    return _mistral3(transformers.MistralConfig(**(own | sizes)), folder)


def ministral3(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, **IN_GGUF["ministral3"][1]}
    return _mistral3(transformers.Ministral3Config(**(own | sizes)), folder)


def _mistral3(text: PretrainedConfig, folder: Path) -> Path:
    tower = transformers.PixtralVisionConfig(**VISION, num_hidden_layers=2)
    config = transformers.Mistral3Config(
        text_config=text, vision_config=tower, image_token_index=300, tie_word_embeddings=False
    )
    return seeing_model(config, folder)


def qwen2_vl(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, **SECTIONS}
    text = transformers.Qwen2VLTextConfig(**(own | sizes))
    vision = transformers.Qwen2VLVisionConfig(
        depth=2, embed_dim=32, hidden_size=text.hidden_size, num_heads=2, mlp_ratio=2
    )
    return seeing_model(transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **TOKENS), folder)


def qwen2_5_vl(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, **SECTIONS}
    text = transformers.Qwen2_5_VLTextConfig(**(own | sizes))
    vision = transformers.Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=text.hidden_size
    )
    return seeing_model(transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **TOKENS), folder)


def qwen3_vl(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, **INTERLEAVED}
    text = transformers.Qwen3VLTextConfig(**(own | sizes))
    vision = transformers.Qwen3VLVisionConfig(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=text.hidden_size,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 2],
    )
    return seeing_model(transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **TOKENS), folder)


def qwen3_5(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, **IN_GGUF["qwen3_5"][1]}
    text = transformers.Qwen3_5TextConfig(**(own | sizes))
    vision = transformers.Qwen3_5VisionConfig(**TOWER_OF_QWEN, out_hidden_size=text.hidden_size)
    return seeing_model(transformers.Qwen3_5Config(text_config=text, vision_config=vision, **TOKENS), folder)


def qwen3_5_moe(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, **IN_GGUF["qwen3_5_moe"][1]}
    text = transformers.Qwen3_5MoeTextConfig(**(own | sizes))
    vision = transformers.Qwen3_5MoeVisionConfig(**TOWER_OF_QWEN, out_hidden_size=text.hidden_size)
    return seeing_model(transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision, **TOKENS), folder)


def llama4(folder: Path, **sizes: Any) -> Path:
    own: dict[str, Any] = {**SMALL, **FAMILIES["llama4"][1], **sizes, "num_hidden_layers": 4}
    text = transformers.Llama4TextConfig(**own)  # one layer of which sees all of a text
    vision = transformers.Llama4VisionConfig(
        **VISION, num_hidden_layers=2, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32
    )
    tokens: dict[str, Any] = {"boi_token_index": 300, "eoi_token_index": 301, "image_token_index": 302}
    return seeing_model(transformers.Llama4Config(text_config=text, vision_config=vision, **tokens), folder)


# All of these.
SEEING = [
    *(gemma3, gemma4, gemma4_unified, llama4, llava, mistral3, ministral3),
    *(qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, qwen3_5_moe),
]


def gemma3n(folder: Path, **sizes: Any) -> Path:
    """The text model under the names that it has beside towers, and a tensor of one: theirs need a package."""
    own: dict[str, Any] = {**SMALL, **IN_GGUF["gemma3n"][1]}
    text = transformers.Gemma3nTextConfig(**(own | sizes))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(text)
    vary_vectors(model)
    names = {name: name.replace("model.", "model.language_model.", 1) for name in model.state_dict()}
    tensors = {names[name]: tensor for name, tensor in model.state_dict().items() if name not in tied_weights(model)}
    folder.mkdir()
    save_file(tensors | {"model.vision_tower.weight": torch.ones(4)}, folder / "model.safetensors")
    transformers.Gemma3nConfig(text_config=text).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder


def text_model_alone(model: Path, folder: Path) -> Path:
    """Save the text model of one that also takes images, as transformers holds it, in `folder`; returns the folder."""
    whole: Any = AutoModelForImageTextToText.from_pretrained(model)
    config = whole.config.text_config
    if plain := SAME_WITH_TEXT.get(config.model_type):
        settings = config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
        del settings["model_type"]
        config = plain(**settings)
    config.tie_word_embeddings = whole.config.tie_word_embeddings
    alone: Any = AutoModelForCausalLM.from_config(config)
    inner = whole.language_model.model if hasattr(whole, "language_model") else whole.model.language_model
    alone.model.load_state_dict(inner.state_dict())
    alone.lm_head.load_state_dict(whole.get_output_embeddings().state_dict())
    alone.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return folder
