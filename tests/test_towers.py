"""Of models that also see, the decoder is quantized and the rest carried, or they are refused in one line."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForImageTextToText, PretrainedConfig

from commands import call
from dashq import run
from dashq.quantizing.opening import open_model
from pico import SMALL, pico_tokenizer
from recipes import build_recipe, small_recipe, write_recipe

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
    """Save a tiny random model that takes images as well; returns the folder."""
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text('{"do_resize": true}\r\n')
    return folder


def gemma3(folder: Path) -> Path:
    sizes: dict[str, Any] = {**SMALL, "head_dim": 12, "sliding_window": 16}
    text = transformers.Gemma3TextConfig(**sizes)
    tokens: dict[str, Any] = {"image_token_id": 300, "boi_token_id": 301, "eoi_token_id": 302, "mm_tokens_per_image": 4}
    return seeing_model(transformers.Gemma3Config(text_config=text, vision_config=TOWER, **tokens), folder)


def test_the_decoder_is_quantized_and_a_larger_tower_is_carried(tmp_path: Path) -> None:
    recipe = build_recipe(gemma3(tmp_path / "model"), tmp_path / "out", dtype="float32")
    assert all(name.startswith("model.language_model.layers.") for name in open_model(recipe).blocks)
    out = run(recipe)
    original: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    opened: Any = AutoModelForImageTextToText.from_pretrained(out)
    kept = {name: tensor for name, tensor in original.named_parameters() if "language_model" not in name}
    assert len(kept) > 300
    assert all(opened.get_parameter(name).equal(tensor) for name, tensor in kept.items())
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_a_model_that_transformers_opens_as_no_language_model_is_refused_in_one_line(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {**SMALL}
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**sizes), vision_config=TOWER)
    recipe = small_recipe(seeing_model(config, tmp_path / "model"), tmp_path / "out")
    outcome = call("plan", write_recipe(tmp_path / "r.yaml", recipe))
    assert outcome.code == 2
    assert "transformers opens none of type 'llava' as one" in outcome.errors
    assert "save the language model alone" in outcome.errors
    assert len(outcome.errors.splitlines()) == 1
