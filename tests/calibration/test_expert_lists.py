"""Experts in a list see their own tokens, and their routing weights are recovered from the mixture's output."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dashq import CheckpointError
from dashq.model.mixtures import find_mixtures, gate_names
from mixtures import ListOfExperts, block_of, fold_through, mixture_scheme
from recipes import build_recipe


@pytest.mark.parametrize("names", ["", "abcd"], ids=["list", "dictionary"])
def test_experts_in_a_list_see_what_they_are_given(names: str, tmp_path: Path) -> None:
    block, x = block_of(ListOfExperts(names=names))
    recipe = build_recipe(tmp_path, tmp_path / "out", scheme=mixture_scheme())
    (mixture,) = find_mixtures(block)
    given: dict[str, list[Tensor]] = {name: [] for name in mixture.matrices}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given[name].append(inputs[0])

    for name in mixture.matrices:
        block.get_submodule(name).register_forward_pre_hook(partial(note, name))
    with torch.no_grad():
        block.get_submodule("mlp")(x)
    expected = {name: torch.cat(inputs) for name, inputs in given.items()}
    seen = fold_through(block, block.get_submodule("mlp"), recipe, x)
    assert gate_names(block) == {"mlp.gate"}
    assert [matrix.expert for matrix in mixture.matrices.values()] == [e for e in range(4) for _ in range(3)]
    assert len(expected) == 12
    for name, inputs in expected.items():
        assert seen[f"block.{name}"].tokens == len(inputs)
        assert torch.allclose(seen[f"block.{name}"].curvature.diagonal(), inputs.square().mean(0), rtol=1e-4)


def odd(scores: Tensor) -> Tensor:
    """A gate that no score goes through alone and unchanged."""
    return scores.sigmoid() * scores.sigmoid().roll(1, dims=-1)


@pytest.mark.parametrize("share", [False, True], ids=["as it is", "divided by its sum"])
@pytest.mark.parametrize(
    "gate", [partial(torch.softmax, dim=-1), torch.sigmoid, odd], ids=["softmax", "sigmoid", "odd"]
)
def test_experts_in_a_list_are_weighted_by_their_own_gate(gate: Any, share: bool, tmp_path: Path) -> None:
    block, x = block_of(mlp := ListOfExperts(gate, share=share))
    recipe = build_recipe(tmp_path, tmp_path / "out", scheme=mixture_scheme(router="gated"))
    seen = fold_through(block, mlp, recipe, x)
    hidden = x.reshape(-1, 48)
    with torch.no_grad():
        weights, index = mlp.weights(hidden)
        probabilities = mlp.function(mlp.gate(hidden))
    if gate is odd:  # then the model's own weights are all there is to know
        probabilities = torch.zeros(40, 4).scatter(1, index, weights)
    for expert in range(4):
        tokens = (index == expert).any(1)
        expected = probabilities[tokens, expert] @ hidden[tokens].square() / probabilities[tokens, expert].sum()
        found = seen[f"block.mlp.experts.{expert}.up_proj"].curvature.diagonal()
        assert torch.allclose(found, expected, rtol=1e-3), expert


def test_a_list_whose_experts_are_not_added_up_is_refused(tmp_path: Path) -> None:
    block, x = block_of(mlp := ListOfExperts(power=2))
    recipe = build_recipe(tmp_path, tmp_path / "out", scheme=mixture_scheme())
    with pytest.raises(
        CheckpointError, match=r"^block\.mlp\.experts: ListOfExperts computes its experts in a way that"
    ):
        fold_through(block, mlp, recipe, x)
