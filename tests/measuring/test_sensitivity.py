"""What an analysis says of a layer: from the definitions, and from the whole model in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dashq import Diagonal, Full, LayerPlan, Quantized, Recipe, run
from dashq.calibration.tokens import draw
from dashq.measuring.analysis import Analysis
from dashq.measuring.choosing import choices_for
from dashq.measuring.gradients import Errors, expected_losses
from dashq.measuring.sensitivity import analyze
from dashq.model.decoder import Model
from dashq.quantizing.opening import open_model
from dashq.results.report import digest, read_report
from pico import pico_model
from recipes import build_recipe, small_scheme

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("sensitivity")
    scheme: dict[str, Any] = small_scheme(estimator="full", solver="rtn")
    return build_recipe(pico_model("llama", folder / "model"), folder / "out", dtype="float32", scheme=scheme)


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> Model:
    return open_model(recipe)


@pytest.fixture(scope="module")
def measurement(recipe: Recipe, model: Model) -> tuple[Analysis, dict[str, Quantized]]:
    kept: dict[str, Quantized] = {}

    def keep(plan: LayerPlan, quantized: Quantized) -> None:
        kept.setdefault(plan.layer.name, quantized)

    return analyze(recipe, model, choices_for(recipe, model, bits=(2, 8)), keep=keep), kept


def test_error_and_sensitivity_are_as_defined(
    recipe: Recipe, model: Model, measurement: tuple[Analysis, dict[str, Quantized]]
) -> None:
    analysis, kept = measurement
    network = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    tokens = draw(recipe.calibration, model.tokenizer).samples
    layer_inputs: list[torch.Tensor] = []
    network.get_submodule(LAYER).register_forward_pre_hook(
        lambda _, inputs: layer_inputs.append(inputs[0].flatten(0, 1))
    )
    with torch.no_grad():
        network(tokens)
    x = layer_inputs[0].double()
    weight = network.get_parameter(f"{LAYER}.weight").detach()
    error = (weight - kept[LAYER].dequantize()).double()
    layer = analysis.by_name[LAYER]
    choice = layer.choices[0]
    outputs, lost = x @ weight.double().T, x @ error.T
    assert choice.error == pytest.approx(float(lost.square().sum() / outputs.square().sum()), rel=1e-4)
    errors = Errors(layer.layer, torch.arange(len(weight)), torch.ones(len(weight)), error.float()[None])
    expected = expected_losses(model, {LAYER: errors}, tokens, recipe.calibration.seed)[LAYER]
    assert choice.sensitivity == pytest.approx(float(expected), rel=1e-2)  # errors wait in bfloat16


def test_more_bits_cost_the_model_less(measurement: tuple[Analysis, dict[str, Quantized]]) -> None:
    for layer in measurement[0].layers:
        costs = {choice.bits: choice.sensitivity for choice in layer.choices}
        assert list(costs) == [3, 2, 8]
        assert costs[2] > costs[3] > 100 * costs[8] > 0


def test_some_rows_of_a_large_layer_stand_for_all(
    recipe: Recipe, model: Model, measurement: tuple[Analysis, dict[str, Quantized]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = choices_for(recipe, model)
    whole = {layer.name: layer.choices[0] for layer in measurement[0].layers}
    all_rows = analyze(recipe, model, choices)
    assert all(layer.choices[0] == whole[layer.name] for layer in all_rows.layers)
    monkeypatch.setattr("dashq.measuring.sensitivity.ROWS", 24)
    for layer in analyze(recipe, model, choices).layers:
        (choice,) = layer.choices
        assert choice.bytes == whole[layer.name].bytes
        assert choice.sensitivity == pytest.approx(whole[layer.name].sensitivity, rel=0.5)
        assert (choice == whole[layer.name]) == (layer.rows == 24)


@pytest.mark.parametrize("family", ["llama", "llama-untied-biased"])
def test_embeddings_and_head_are_measured_by_the_rows_that_matter(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries: dict[str, Any] = {"embeddings": {"bits": 4}} | ({"head": {"bits": 3}} if family != "llama" else {})
    path = pico_model(family, tmp_path / "model")
    recipe = build_recipe(path, tmp_path / "out", dtype="float32", scheme=small_scheme(solver="rtn"), **entries)
    model = open_model(recipe)
    choices = {name: plans for name, plans in choices_for(recipe, model, bits=(2, 8)).items() if ".layers." not in name}
    whole = analyze(recipe, model, choices).layers
    assert {layer.name: layer.role for layer in whole} == (
        {"model.embed_tokens": "tied"} if family == "llama" else {"model.embed_tokens": "embeddings", "lm_head": "head"}
    )
    monkeypatch.setattr("dashq.measuring.sensitivity.ROWS", 60)  # besides those of tokens in the text
    for layer, sampled in zip(whole, analyze(recipe, model, choices).layers, strict=True):
        costs = {choice.bits: choice.sensitivity for choice in layer.choices}
        assert costs[2] > costs[layer.choices[0].bits] > 50 * costs[8] > 0
        for choice, other in zip(layer.choices, sampled.choices, strict=True):
            exact = layer.role == "embeddings"  # tokens that do not occur have no gradients
            assert other.sensitivity == pytest.approx(choice.sensitivity, rel=1e-3 if exact else 0.5)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_a_diagonal_stands_for_a_full_curvature_with_nothing_off_it(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    error, h = torch.randn(rows, columns, generator=generator), torch.rand(columns, generator=generator)
    torch.testing.assert_close(Diagonal(h).row_errors(error), Full(torch.diag(h)).row_errors(error))


@pytest.mark.parametrize("keeps", [False, True])
def test_a_layer_of_weights_below_the_scales_costs_no_more_than_zeros(keeps: bool, tmp_path: Path) -> None:
    folder = pico_model("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.weight"] *= 1e-5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = build_recipe(folder, tmp_path / "out", dtype="float32", scheme=small_scheme(solver="rtn"))
    model = open_model(recipe)
    kept: dict[str, Quantized] = {}

    def keep(plan: LayerPlan, quantized: Quantized) -> None:
        kept[plan.layer.name] = quantized

    analysis = analyze(recipe, model, choices_for(recipe, model), keep=keep if keeps else None)
    report = {layer.name: layer for layer in read_report(run(recipe)).layers}[LAYER]
    assert report.error <= 1
    assert analysis.by_name[LAYER].choices[0].error == pytest.approx(report.error, rel=1e-3)
    assert not keeps or digest(kept[LAYER]) == report.digest
