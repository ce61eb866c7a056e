"""Of models that also see, the decoder is quantized and the rest carried or left out, or they are refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForImageTextToText

from commands import call
from dashq import run
from dashq.quantizing.opening import open_model
from dashq.results.checkpoint import open_network
from gguf_results import fields
from gguf_results import recipe as gguf_recipe
from pico import EVEN
from recipes import build_recipe, small_recipe, small_scheme, write_recipe
from towers import (
    gemma3,
    gemma4,
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

pytestmark = pytest.mark.usefixtures("sentences")


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


@pytest.mark.parametrize("make", [gemma3, gemma4, llava, mistral3, ministral3, qwen3_5])
def test_a_gguf_file_holds_the_text_model_as_if_it_was_alone(make: Callable[..., Path], tmp_path: Path) -> None:
    model = make(tmp_path / "model", **EVEN)
    alone = text_model_alone(model, tmp_path / "alone")
    changes: dict[str, Any] = {"scheme": small_scheme(32, bits=4), "serializer": {"name": "gguf", "four_bits": "Q4_1"}}
    out, expected = (run(build_recipe(each, tmp_path / f"{each.name}-out", **changes)) for each in (model, alone))
    files = [gguf.GGUFReader(folder / "model.gguf") for folder in (out, expected)]
    tensors = [{tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in file.tensors} for file in files]
    assert tensors[0] == tensors[1]
    entries = [{name: field.contents() for name, field in file.fields.items()} for file in files]
    assert {name for name in entries[1] if entries[0].get(name) != entries[1][name]} <= {"general.name"}
    assert entries[0].keys() == entries[1].keys()
    ids = torch.arange(5)[None] + 3
    with torch.inference_mode():
        logits = [open_network(folder, torch.float32)(ids).logits for folder in (out, expected)]
    assert logits[0].equal(logits[1])


def test_plan_and_card_say_that_the_towers_are_left_out_and_where_they_are(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"scheme": small_scheme(32, bits=4), "serializer": {"name": "gguf", "four_bits": "Q4_1"}}
    model = gemma3(tmp_path / "model", **EVEN)
    recipe = write_recipe(tmp_path / "r.yaml", small_recipe(model, tmp_path / "out", **changes))
    sentence = (
        r"the result holds only the text model, without \d+ tensors of multi_modal_projector, vision_tower: "
        r"llama.cpp takes images and sounds through an mmproj file of the original model"
    )
    outcome = call("plan", recipe)
    assert outcome.code == 0, outcome.errors
    assert re.search(sentence, " ".join(outcome.output.split()))
    card = (run(build_recipe(model, tmp_path / "out", **changes)) / "README.md").read_text()
    assert re.search(rf"> \*\*Note:\*\* {sentence}", card)


def test_a_result_with_towers_is_not_packed_anew_as_a_gguf_file(tmp_path: Path) -> None:
    recipe = build_recipe(gemma3(tmp_path / "model", **EVEN), tmp_path / "out", scheme=small_scheme(32, bits=4))
    outcome = call("convert", run(recipe), "--to", "{name: gguf, four_bits: Q4_1}", "--output", tmp_path / "other")
    assert outcome.code == 2
    assert "holds the text model of 'gemma3' alone: a run reads that from the original" in outcome.errors


@pytest.mark.parametrize(
    ("make", "architecture", "sections"),
    [
        (qwen2_vl, "qwen2vl", [2, 3, 3, 0]),
        (qwen2_5_vl, "qwen2vl", [2, 3, 3, 0]),
        (qwen3_vl, "qwen3vl", [3, 3, 2, 0]),
        (qwen3_5, "qwen35", [2, 1, 1, 0]),
        (qwen3_5_moe, "qwen35moe", [2, 1, 1, 0]),
    ],
)
def test_a_gguf_file_says_how_many_columns_each_position_of_an_image_turns(
    make: Callable[..., Path], architecture: str, sections: list[int], tmp_path: Path
) -> None:
    model = make(tmp_path / "model", **EVEN)
    alone = text_model_alone(model, tmp_path / "alone")
    out, expected = (run(gguf_recipe(each, tmp_path / f"{each.name}-out")) for each in (model, alone))
    files = [gguf.GGUFReader(folder / "model.gguf") for folder in (out, expected)]
    tensors = [{tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in file.tensors} for file in files]
    assert tensors[0] == tensors[1]
    said = fields(out)
    assert (said["general.architecture"], said[f"{architecture}.rope.dimension_sections"]) == (architecture, sections)
    assert said.get(f"{architecture}.n_deepstack_layers") == (2 if architecture == "qwen3vl" else None)


@pytest.mark.parametrize("make", [llava, qwen3_vl, qwen3_5, qwen3_5_moe])
def test_a_recipe_for_llama_cpp_begins_with_the_layers_of_the_text_model(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    model = make(tmp_path / "model", **EVEN)
    words = ("init", model, "--for", "llama.cpp", "--bits", "4", "--text", "pydoc", "--output", tmp_path / "out")
    outcome = call(*words)
    assert outcome.code == 0, outcome.errors
    (tmp_path / "out.yaml").write_text(outcome.output)
    outcome = call("plan", tmp_path / "out.yaml")
    assert outcome.code == 0, outcome.errors
    assert "the result holds only the text model" in " ".join(outcome.output.split())


def test_a_model_that_transformers_opens_as_no_language_model_is_refused_in_one_line(tmp_path: Path) -> None:
    outcome = call("plan", write_recipe(tmp_path / "r.yaml", small_recipe(llava(tmp_path / "model"), tmp_path / "out")))
    assert outcome.code == 2
    assert "transformers opens none of type 'llava' as one" in outcome.errors
    assert "save the language model alone" in outcome.errors
    assert outcome.errors.rstrip().endswith("Formats that hold its language model alone: gguf")
    assert len(outcome.errors.splitlines()) == 1
