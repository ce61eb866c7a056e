"""A loaded result computes with packed experts, and experts can be left as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dashq import run
from dashq.runtime.experts import DashqExperts
from dashq.runtime.linear import DashqLinear
from family_results import FamilyResults
from pico import MIXTURES
from recipes import build_recipe, mixture_scheme


@pytest.mark.parametrize("family", MIXTURES)
def test_the_result_opens_with_the_dequantized_experts(family: str, families: FamilyResults) -> None:
    original: Any = AutoModelForCausalLM.from_pretrained(families.model(family), dtype=torch.float32)
    packed: Any = AutoModelForCausalLM.from_pretrained(families.result(family), dtype=torch.float32)
    mixtures = {name: module for name, module in packed.named_modules() if isinstance(module, DashqExperts)}
    assert mixtures
    for name, module in packed.named_modules():
        if isinstance(module, DashqLinear) and not name.startswith(tuple(mixtures)):
            original.get_submodule(name).weight.data.copy_(module.weight)
    for name, module in mixtures.items():
        experts = original.get_submodule(name)
        transposed = family in ("gpt_oss", "llama4")
        for stack, layers in module.named_children():
            parameter = experts.get_parameter(stack).data
            for expert, layer in enumerate(layers.children()):
                weight = parameter[expert].T if transposed else parameter[expert]
                assert 0 < float((weight - layer.weight).abs().mean()) < float(weight.abs().mean())
                weight.copy_(layer.weight)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, original(ids).logits, rtol=1e-3, atol=1e-3)
        assert packed.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
        plain = packed.dequantize()
        assert not any(isinstance(module, DashqExperts | DashqLinear) for module in plain.modules())
        torch.testing.assert_close(plain(ids).logits, original(ids).logits, rtol=1e-3, atol=1e-3)


def test_some_experts_can_be_left_as_they_are(families: FamilyResults, tmp_path: Path) -> None:
    original = families.model("mixtral")
    skip = [
        {"match": r".*\.1\.mlp\.experts\.gate_up_proj\.(0|2)", "skip": True},
        {"match": r".*\.2\.mlp\.experts\.down.*", "skip": True},
    ]
    recipe = build_recipe(original, tmp_path / "out", dtype="float32", scheme=mixture_scheme(), overrides=skip)
    model: Any = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    packed: Any = AutoModelForCausalLM.from_pretrained(run(recipe), dtype=torch.float32)
    layers = packed.model.layers
    assert layers[1].mlp.experts.gate_up_proj[2].weight.equal(model.model.layers[1].mlp.experts.gate_up_proj[2])
    assert isinstance(layers[1].mlp.experts.gate_up_proj[1], DashqLinear)
    assert layers[2].mlp.experts.down_proj.equal(model.model.layers[2].mlp.experts.down_proj)
    plain = packed.dequantize()
    assert plain.model.layers[1].mlp.experts.gate_up_proj[2].equal(model.model.layers[1].mlp.experts.gate_up_proj[2])
