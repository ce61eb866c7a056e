"""A run writes results that open with the dequantized weights, and tells what they have lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dashq import DashqLinear, run
from dashq.calibration.tokens import draw_for
from dashq.measuring.judgement import judged_tokens
from dashq.model.decoder import linear_weight
from dashq.model.mixtures import linear_modules
from dashq.quantizing.opening import open_model
from dashq.results.report import read_report
from family_results import FamilyResults
from pico import FAMILIES, MIXTURES, pico_model
from recipes import build_recipe, small_scheme

DENSE = [family for family in FAMILIES if family not in MIXTURES]


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", DENSE)
def test_the_result_opens_in_transformers_with_the_dequantized_weights(family: str, families: FamilyResults) -> None:
    original, packed = plain(families.model(family)), plain(families.result(family))
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, DashqLinear)}
    outside = {name for name, module in linear_modules(original) if module is original.get_output_embeddings()}
    assert layers.keys() == {name for name, _ in linear_modules(original)} - outside
    for name, layer in layers.items():
        module = original.get_submodule(name)
        weight = linear_weight(module, module.weight.data)
        approximation = layer.quantized().dequantize()
        assert 0 < float((weight - approximation).abs().mean()) < float(weight.abs().mean())
        weight.copy_(approximation)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)
        assert packed.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
        unpacked = packed.dequantize()
        assert not any(isinstance(module, DashqLinear) for module in unpacked.modules())
        torch.testing.assert_close(unpacked(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama-untied-biased", "gemma3"])
def test_the_judgement_is_of_the_result_with_its_embeddings_and_head(family: str, tmp_path: Path) -> None:
    path = pico_model(family, tmp_path / "model")
    entries: dict[str, Any] = {"embeddings": {"bits": 2}} | ({"head": {"bits": 2}} if "untied" in family else {})
    scheme = small_scheme(bits=8, solver="rtn")  # so that nearly all that is lost is lost there
    recipe = build_recipe(path, tmp_path / "out", dtype="float32", scheme=scheme, **entries)
    judgement = read_report(run(recipe)).judgement
    drawn = draw_for(open_model(recipe), recipe.calibration)
    tokens = judged_tokens(drawn)
    original, quantized = (plain(folder)(tokens).logits[:, :-1].log_softmax(-1) for folder in (path, tmp_path / "out"))
    lost = functional.kl_div(quantized, original, reduction="none", log_target=True).sum(-1).mean()
    assert judgement
    assert judgement.divergence
    assert judgement.divergence == pytest.approx(float(lost), rel=1e-3)
    assert judgement.divergence > 0.01


def test_computing_in_another_type_rounds_no_weight(model: Path, tmp_path: Path) -> None:
    scheme = small_scheme(solver="rtn")
    recipes = [build_recipe(model, tmp_path / dtype, dtype=dtype, scheme=scheme) for dtype in ("float32", "bfloat16")]
    exact, rounded = (load_file(run(recipe) / "model.safetensors") for recipe in recipes)
    assert exact.keys() == rounded.keys()
    assert all(tensor.equal(rounded[name]) for name, tensor in exact.items())
