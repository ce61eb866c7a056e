"""Every layer of a block sees what it sees in the whole model in memory, in every family of dense models."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dashq.pipeline import open_model
from family_results import FamilyResults
from observations import observe
from pico import FAMILIES, MIXTURES
from recipes import build_recipe

DENSE = [family for family in FAMILIES if family not in MIXTURES]


@pytest.mark.parametrize("family", DENSE)
def test_every_layer_sees_what_it_sees_in_the_whole_model(family: str, families: FamilyResults, tmp_path: Path) -> None:
    recipe = build_recipe(families.model(family), tmp_path / "out", dtype="float32")
    tokens, observations = observe(recipe)
    network = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    expected = squared_inputs(network, tokens, list(observations))
    assert observations.keys() == {layer.name for layer in open_model(recipe).layers()}
    assert observations
    for name, observation in observations.items():
        assert torch.allclose(observation.curvature.diagonal(), expected[name], rtol=1e-4, atol=1e-6), name


@torch.no_grad()
def squared_inputs(model: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    squares: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares[name] = inputs[0].flatten(0, -2).square().mean(0)

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(note, name))
    model(tokens)
    return squares
