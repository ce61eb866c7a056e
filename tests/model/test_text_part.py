"""The text model of one that also takes images is read as if it was alone, whatever the files call its tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from dashq.model.decoder import Model
from dashq.model.location import Location
from dashq.model.text_part import text_config
from pico import EVEN
from towers import (
    SEEING,
    gemma3,
    gemma3n,
    llava,
    ministral3,
    mistral3,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    text_model_alone,
)

ELSEWHERE: dict[str, str] = dict.fromkeys(
    (
        *("gemma3", "gemma3n", "gemma4", "gemma4_unified", "llama4", "llava", "mistral3"),
        *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe"),
    ),
    "they lie elsewhere",
)


def opened(folder: Path) -> Model:
    return Model(Location(folder), torch.device("cpu"), torch.float32, ELSEWHERE)


def read_all(model: Model) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with model.outside() as outside:
        tensors |= outside
    for block in model.walk():
        tensors |= block.tensors
    return tensors


def rename(folder: Path, changed: Callable[[str], str | None]) -> None:
    """Give the tensors of a model other names in its file; those without one go."""
    path = folder / "model.safetensors"
    tensors = {changed(name): tensor for name, tensor in load_file(path).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, path, metadata={"format": "pt"})


def newer(name: str) -> str:
    for old in ("language_model.model.", "vision_tower.", "multi_modal_projector."):
        if name.startswith(old):
            return f"model.{name.replace('language_model.model.', 'language_model.', 1)}"
    return name


def older(name: str) -> str:
    return newer(name).replace("model.language_model.", "language_model.model.", 1)


@pytest.mark.parametrize("names", [older, newer])
@pytest.mark.parametrize("make", SEEING)
def test_its_tensors_have_the_names_and_values_of_a_model_of_text_alone(
    make: Callable[..., Path], names: Callable[[str], str], tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", **EVEN)
    alone = opened(text_model_alone(folder, tmp_path / "alone"))
    rename(folder, names)
    tensors, expected = read_all(opened(folder)), read_all(alone)
    assert tensors.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in tensors.items())
    assert alone.warnings == ()


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_of_its_own_is_read_by_both_names(name: str, tmp_path: Path) -> None:
    path = gemma3(tmp_path / "model") / "model.safetensors"
    tensors = load_file(path)
    head = 2 * next(tensor for key, tensor in tensors.items() if key.endswith("embed_tokens.weight"))
    save_file(tensors | {name: head}, path, metadata={"format": "pt"})
    assert read_all(opened(path.parent))["lm_head.weight"].equal(head)


def test_what_is_left_out_is_told_with_where_it_is(tmp_path: Path) -> None:
    folder = gemma3(tmp_path / "model")
    count = sum("language_model" not in name for name in load_file(folder / "model.safetensors"))
    assert opened(folder).warnings == (
        f"the result holds only the text model, without {count} tensors of multi_modal_projector, vision_tower: "
        "they lie elsewhere",
    )


def test_nothing_is_told_where_the_towers_are_gone_already(tmp_path: Path) -> None:
    folder = gemma3(tmp_path / "model")
    rename(folder, lambda name: name if "language_model" in name else None)
    assert opened(folder).warnings == ()


def test_types_that_are_not_named_are_opened_whole(tmp_path: Path) -> None:
    folder = gemma3(tmp_path / "model")
    model = Model(Location(folder), torch.device("cpu"), torch.float32, {"gemma4": "they lie elsewhere"})
    assert model.network.config.model_type == "gemma3"
    assert model.warnings == ()


def test_the_whole_configuration_says_of_which_type_weights_are_and_whether_the_head_is_tied(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(gemma3(tmp_path / "model"))
    config.dtype, config.tie_word_embeddings = torch.bfloat16, False
    text = text_config(config)
    assert (text.model_type, text.dtype, text.tie_word_embeddings) == ("gemma3_text", torch.bfloat16, False)


def test_files_that_name_the_text_model_as_if_it_was_alone_are_read(tmp_path: Path) -> None:
    """So those of Qwen-VL did at first, with the tower beside it."""
    folder = qwen2_5_vl(tmp_path / "model", **EVEN)
    alone = read_all(opened(text_model_alone(folder, tmp_path / "alone")))
    rename(folder, lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual."))
    model = opened(folder)
    tensors = read_all(model)
    assert tensors.keys() == alone.keys()
    assert all(tensor.equal(alone[name]) for name, tensor in tensors.items())
    assert "tensors of visual: they lie elsewhere" in model.warnings[0]


@pytest.mark.parametrize("make", [llava, mistral3, ministral3, qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_5, qwen3_5_moe])
def test_it_computes_with_text_what_the_whole_model_does(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model", **EVEN)
    whole: Any = AutoModelForImageTextToText.from_pretrained(folder)
    config = text_config(AutoConfig.from_pretrained(folder))
    text: Any = AutoModelForCausalLM.from_config(config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    ids = torch.arange(40)[None] + 3
    with torch.inference_mode():
        expected, logits = (model.eval()(input_ids=ids).logits for model in (whole, text))
    assert logits.equal(expected)


def test_the_text_model_of_gemma_3n_is_found_beside_its_towers(tmp_path: Path) -> None:
    folder = gemma3n(tmp_path / "model", **EVEN)
    stored, model = load_file(folder / "model.safetensors"), opened(folder)
    tensors = read_all(model)
    assert model.network.config.model_type == "gemma3n_text"
    assert all(
        tensor.equal(stored[name.replace("model.", "model.language_model.", 1)]) for name, tensor in tensors.items()
    )
    assert len(tensors) == len(stored) - 1
    assert "without 1 tensors of vision_tower: they lie elsewhere" in model.warnings[0]


def test_what_tells_its_positions_from_those_of_text_is_kept(tmp_path: Path) -> None:
    config: Any = text_config(AutoConfig.from_pretrained(qwen3_vl(tmp_path / "model")))
    assert (config.model_type, config.mrope_section, config.deepstack_visual_indexes) == ("qwen3", [3, 3, 2], [0, 2])
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}
