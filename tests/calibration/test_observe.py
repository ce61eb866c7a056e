"""Every layer of a block sees what it sees in the whole model in memory, in every family of dense models."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dashq import make_plan
from dashq.calibration.observe import observe_inputs
from dashq.calibration.stream import Stream
from dashq.quantizing.opening import open_model
from family_results import FamilyResults
from observations import observe
from pico import FAMILIES, MIXTURES
from recipes import build_recipe
from tensors import noise

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


def test_inputs_that_layers_share_are_folded_once_for_each_estimator(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", overrides=[{"match": ".*k_proj", "estimator": "full"}])
    opened = open_model(recipe)
    q, k, v = make_plan(recipe, opened.layers())[:3]
    stream = Stream(opened, torch.zeros(4, 7, dtype=torch.int64), samples_per_batch=1)
    batches, originals = [noise(n, 2, 7, 48) for n in range(3)], [noise(n, 2, 7, 48) for n in range(3, 6)]
    inputs, others = [batches[0], None, *batches[1:]], [originals[0], None, *originals[1:]]
    observations = observe_inputs([q, k, v], inputs, others, stream)
    assert observations[q.layer.name] is observations[v.layer.name] is not observations[k.layer.name]
    x, x_original = (torch.cat(parts).reshape(-1, 48) for parts in (batches, originals))
    for plan in (q, k, v):
        observation = observations[plan.layer.name]
        assert observation.tokens == 42
        torch.testing.assert_close(observation.curvature.diagonal(), x.square().mean(0))
        assert observation.input_shift is not None
        torch.testing.assert_close(observation.input_shift, (x_original - x).T @ x / 42)
    torch.testing.assert_close(observations[k.layer.name].curvature.dense(), x.T @ x / 42)


@torch.no_grad()
def squared_inputs(model: nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    squares: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares[name] = inputs[0].flatten(0, -2).square().mean(0)

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(partial(note, name))
    model(tokens)
    return squares
