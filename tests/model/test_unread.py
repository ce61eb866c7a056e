"""What no module reads is named before a run and in the report, or refused where the model would become another."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from broken_models import is_untouched, refusal
from commands import call
from dashq import run
from dashq.model.unread import unread_tensors
from dashq.quantizing.opening import open_model
from dashq.results.convert import convert
from dashq.results.events import Event, RunStarted
from dashq.results.report import read_report
from dashq.runtime.quantizer import build_serializer
from pico import SMALL, pico_model, pico_tokenizer
from recipes import build_recipe, mixture_recipe, small_recipe, write_recipe

PREDICTING = ["model.layers.3.eh_proj.weight", "model.layers.3.input_layernorm.weight", "mtp.fc.weight"]
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def single_file_model(tmp_path: Path) -> Path:
    """A model in one file, to be changed."""
    return pico_model("llama", tmp_path / "model")


def extend(model: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Put more tensors into the file, and other entries into the configuration."""
    save_file(load_file(model / "model.safetensors") | tensors, model / "model.safetensors", metadata={"format": "pt"})
    entries = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(entries | config))
    return model


def flat(text: str) -> str:
    return " ".join(text.split())


def test_tensors_that_no_module_reads_are_named_by_plan_run_and_report(single_file_model: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(single_file_model, tmp_path / "plain")
    model = extend(single_file_model, {name: torch.ones(2, 2) for name in PREDICTING})
    sentence = (
        "3 tensors of the model are read by no module of transformers and will not be in the result: "
        f"{', '.join(sorted(PREDICTING))}"
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", small_recipe(model, tmp_path / "out"))
    for command in ("plan", "run"):
        outcome = call(command, recipe)
        assert outcome.code == 0
        assert sentence.replace(" ", "") in flat(outcome.output).replace(" ", "")
    assert read_report(tmp_path / "out").warnings == (sentence,)
    assert load_file(tmp_path / "out/model.safetensors").keys().isdisjoint(PREDICTING)
    unextended = run(build_recipe(plain, tmp_path / "of-plain"))
    assert read_report(unextended).warnings == ()
    weights = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", unextended)]
    assert weights[0] == weights[1]


def test_the_configuration_says_that_predicting_layers_are_not_there(single_file_model: Path, tmp_path: Path) -> None:
    tensors = {name: torch.ones(2, 2) for name in PREDICTING}
    model = extend(single_file_model, tensors, num_nextn_predict_layers=2)
    events: list[Event] = []
    out = run(build_recipe(model, tmp_path / "out"), events.append)
    [started] = [event for event in events if isinstance(event, RunStarted)]
    cleared = "`num_nextn_predict_layers` is 0 in the result's config.json, 2 in the model's: those layers are not kept"
    assert started.warnings[1:] == (cleared,)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    there = convert(out, build_serializer({"name": "dashq", "dtype": "float16"}), tmp_path / "there")
    assert read_report(there).warnings == read_report(out).warnings == started.warnings


def test_layers_beyond_those_of_the_configuration_are_named(single_file_model: Path, tmp_path: Path) -> None:
    model = extend(single_file_model, {}, num_hidden_layers=2)
    (sentence,) = open_model(build_recipe(model, tmp_path / "out")).warnings
    assert sentence.startswith("9 tensors of the model are read by no module")
    assert sentence.endswith("and 5 more")
    assert "model.layers.2.input_layernorm.weight" in sentence


@pytest.mark.parametrize("family", ["llama", "llama-untied-biased", "gpt2", "gpt_neox", "opt", "qwen3_moe", "gemma3"])
def test_a_model_as_transformers_saves_it_has_nothing_unread(family: str, tmp_path: Path) -> None:
    model = pico_model(family, tmp_path / "model")
    assert open_model(mixture_recipe(model, tmp_path / "out")).warnings == ()


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.rotary_emb.inv_freq", "h.0.attn.bias", "h.0.attn.masked_bias", "position_ids"],
)
def test_what_modules_compute_anew_is_not_named(name: str) -> None:
    assert unread_tensors("a model", {name: name}, ["h.0.attn.c_attn.weight"]) == ()


def test_biases_that_the_configuration_denies_are_refused(single_file_model: Path) -> None:
    model = extend(single_file_model, {f"{Q}.bias": torch.ones(48), "model.norm.bias": torch.ones(48)})
    message = refusal(model)
    assert message.startswith(f"{model} holds 2 biases that no module reads, the first is {Q}.bias")
    assert "`attention_bias`" in message
    assert is_untouched(model.with_name("out"))


@pytest.mark.parametrize("part", ["weight_scale_inv", "weight_scale", "input_scale", "scales", "SCB", "weight.absmax"])
def test_scales_of_weights_that_are_not_read_are_refused(part: str, single_file_model: Path) -> None:
    model = extend(single_file_model, {f"{Q}.{part}": torch.ones(1)})
    message = refusal(model)
    assert f"holds 1 tensors beside weights that no module reads, the first is {Q}.{part}" in message
    assert "the original weights, or save these dequantized in bfloat16 first" in message
    assert is_untouched(model.with_name("out"))


@pytest.mark.parametrize("part", ["down_proj.weight_scale_inv", "down_proj_scale_inv", "down_proj_bias"])
def test_scales_and_biases_of_experts_are_refused(part: str, tmp_path: Path) -> None:
    model = pico_model("qwen3_moe", tmp_path / "model")
    name = f"model.layers.1.mlp.experts.{'2.' if part.startswith('down_proj.') else ''}{part}"
    extend(model, {name: torch.ones(1)})
    assert f"the first is {name}" in refusal(model)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_is_refused_before_its_head_is_lost(family: str, tied: bool, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**SMALL, num_labels=1, tie_word_embeddings=tied)
    model = tmp_path / "model"
    getattr(transformers, f"{family}ForSequenceClassification")(config).save_pretrained(model)
    pico_tokenizer().save_pretrained(model)
    assert f"{model} holds score.weight, the head of a classifier or reward model" in refusal(model)
    assert is_untouched(tmp_path / "out")


def test_a_value_head_beside_the_head_of_words_is_refused(single_file_model: Path) -> None:
    model = extend(single_file_model, {"v_head.summary.weight": torch.ones(1, 48)})
    assert f"{model} holds v_head.summary.weight" in refusal(model)
