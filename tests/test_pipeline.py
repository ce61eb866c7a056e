"""A run writes results that open with the dequantized weights, and later blocks see what the recipe says."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from broken_models import DOWN, change, refusal
from dashq import Curvature, DashqLinear, Grid, Grouping, PluginError, Quantized, hookimpl, load_registry, run
from dashq.calibration.tokens import draw_for
from dashq.measuring.judgement import judged_tokens
from dashq.model.decoder import linear_weight
from dashq.model.mixtures import linear_modules
from dashq.pipeline import open_model
from dashq.results.report import read_report
from dashq_plugins.solvers.rtn import RoundToNearestSolver
from family_results import FamilyResults
from pico import FAMILIES, MIXTURES, pico_model
from recipes import TEXT, build_recipe, mixture_scheme, small_scheme

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


def test_blocks_see_quantized_blocks_only_when_the_recipe_says_so(model: Path, tmp_path: Path) -> None:
    def first_and_last(propagate: str) -> tuple[Tensor, Tensor]:
        recipe = build_recipe(model, tmp_path / propagate, calibration=TEXT | {"propagate": propagate})
        tensors = load_file(run(recipe) / "model.safetensors")
        return tensors["model.layers.0.self_attn.q_proj.scale"], tensors["model.layers.2.mlp.down_proj.scale"]

    first, last = first_and_last("original")
    first_again, last_again = first_and_last("quantized")
    assert torch.equal(first, first_again)
    assert not torch.equal(last, last_again)


def test_weights_beyond_the_numbers_of_the_format_are_refused_by_layer(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", shard="100KB")
    change(model, DOWN, lambda tensors: tensors[DOWN].view(-1)[:1].fill_(1e6))
    message = refusal(model)
    assert message.startswith(f"{DOWN.removesuffix('.weight')}: weights up to 1e+06 do not fit")


class Chatty(RoundToNearestSolver):
    name = "chatty"

    def solve(self, weight: Tensor, curvature: Curvature, grouping: Grouping, grid: Grid) -> Quantized:
        return replace(super().solve(weight, curvature, grouping, grid), statistics={"gamma": 1.0})


def test_figures_of_one_name_from_estimator_and_solver_are_no_figure(model: Path, tmp_path: Path) -> None:
    registry = load_registry(SimpleNamespace(dashq_solvers=hookimpl(lambda: [Chatty])))
    recipe = build_recipe(model, tmp_path / "out", registry, scheme=small_scheme(solver="chatty", estimator="hybrid"))
    with pytest.raises(PluginError, match=r"^model\.layers\.0\.\S+: estimator 'hybrid' and solver 'chatty' .* 'gamma'"):
        run(recipe)


def test_later_blocks_see_quantized_experts_when_the_recipe_says_so(families: FamilyResults, tmp_path: Path) -> None:
    model = families.model("mixtral")

    def offsets(propagate: str) -> tuple[Tensor, Tensor]:
        text = TEXT | {"propagate": propagate}
        recipe = build_recipe(
            model, tmp_path / propagate, calibration=text, scheme=mixture_scheme(solver="closed_form")
        )
        tensors = load_file(run(recipe) / "model.safetensors")
        name = "model.layers.{}.mlp.experts.gate_up_proj.1.scale"
        return tensors[name.format(0)], tensors[name.format(2)]

    first, last = offsets("original")
    first_again, last_again = offsets("quantized")
    assert first.equal(first_again)
    assert not last.equal(last_again)
    first_in_sequence, _ = offsets("sequential")  # behind the quantized attention of their own block
    assert not first.equal(first_in_sequence)
