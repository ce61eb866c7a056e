"""Experts in a list see their own tokens, and their routing weights are recovered from the mixture's output."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dashq import CheckpointError, make_plan
from dashq.calibration.experts import MixtureWatcher, watching_experts
from dashq.data import Layer
from dashq.model.mixtures import BlockExperts
from recipes import build_recipe, mixture_scheme


class Expert(nn.Module):
    """A gated expert of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(48, 32, bias=False), nn.Linear(48, 32, bias=False)
        self.down_proj = nn.Linear(32, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return product


class ListOfExperts(nn.Module):
    """A mixture as models wrote it before experts were stacked; `power` is that of the sum of its experts."""

    def __init__(
        self, gate: Any = torch.sigmoid, chosen: int = 2, share: bool = False, names: str = "", power: int = 1
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(48, 4, bias=False)
        experts = [Expert() for _ in range(4)]
        self.experts = nn.ModuleDict(dict(zip(names, experts, strict=True))) if names else nn.ModuleList(experts)
        self.shared_experts = Expert()
        self.function, self.chosen, self.share, self.power = gate, chosen, share, power

    def weights(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores: Tensor = self.gate(hidden)
        weights, index = self.function(scores).topk(self.chosen)
        return (weights / weights.sum(-1, keepdim=True) if self.share else weights), index

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.reshape(-1, x.shape[-1])
        weights, index = self.weights(hidden)
        result = torch.zeros_like(hidden)
        for expert, module in enumerate(self.experts.children()):
            tokens, places = torch.where(index == expert)
            if len(tokens):
                result[tokens] += module(hidden[tokens]) * weights[tokens, places, None]
        shared: Tensor = self.shared_experts(hidden)
        return (result**self.power + 0.5 * shared).reshape(x.shape)


def block_of(mixture: nn.Module) -> tuple[nn.Module, Tensor]:
    """A block with a mixture, and what is given to it."""
    torch.manual_seed(0)
    for parameter in mixture.parameters():
        nn.init.normal_(parameter, std=0.3)
    block = nn.Module()
    block.mlp = mixture
    return block, torch.randn(2, 20, 48)


def fold_through(block: nn.Module, part: nn.Module, recipe: Any, x: Tensor) -> dict[str, Any]:
    """What the layers of the only mixture in a block learn from one batch through a part of it."""
    (mixture,) = BlockExperts(block).mixtures
    layers = [
        Layer(name=f"block.{name}", rows=32, columns=32 if "down" in name else 48, expert=matrix.expert)
        for name, matrix in mixture.matrices.items()
    ]
    watcher = MixtureWatcher("block", mixture, make_plan(recipe, layers))
    with torch.no_grad(), watching_experts(watcher):
        part(x)
    return dict(watcher.observations())


@pytest.mark.parametrize("names", ["", "abcd"], ids=["list", "dictionary"])
def test_experts_in_a_list_see_what_they_are_given(names: str, tmp_path: Path) -> None:
    block, x = block_of(ListOfExperts(names=names))
    recipe = build_recipe(tmp_path, tmp_path / "out", scheme=mixture_scheme())
    (mixture,) = BlockExperts(block).mixtures
    batches: dict[str, list[Tensor]] = {name: [] for name in mixture.matrices}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        batches[name].append(inputs[0])

    for name in mixture.matrices:
        block.get_submodule(name).register_forward_pre_hook(partial(note, name))
    with torch.no_grad():
        block.get_submodule("mlp")(x)
    expected = {name: torch.cat(inputs) for name, inputs in batches.items()}
    observations = fold_through(block, block.get_submodule("mlp"), recipe, x)
    assert BlockExperts(block).gates == {"mlp.gate"}
    assert [matrix.expert for matrix in mixture.matrices.values()] == [e for e in range(4) for _ in range(3)]
    assert len(expected) == 12
    for name, inputs in expected.items():
        assert observations[f"block.{name}"].tokens == len(inputs)
        assert torch.allclose(observations[f"block.{name}"].curvature.diagonal(), inputs.square().mean(0), rtol=1e-4)


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
    observations = fold_through(block, mlp, recipe, x)
    hidden = x.reshape(-1, 48)
    with torch.no_grad():
        weights, index = mlp.weights(hidden)
        probabilities = mlp.function(mlp.gate(hidden))
    if gate is odd:  # then the model's own weights are all there is to know
        probabilities = torch.zeros(40, 4).scatter(1, index, weights)
    for expert in range(4):
        tokens = (index == expert).any(1)
        expected = probabilities[tokens, expert] @ hidden[tokens].square() / probabilities[tokens, expert].sum()
        diagonal = observations[f"block.mlp.experts.{expert}.up_proj"].curvature.diagonal()
        assert torch.allclose(diagonal, expected, rtol=1e-3), expert


def test_a_list_whose_experts_are_not_added_up_is_refused(tmp_path: Path) -> None:
    block, x = block_of(mlp := ListOfExperts(power=2))
    recipe = build_recipe(tmp_path, tmp_path / "out", scheme=mixture_scheme())
    with pytest.raises(
        CheckpointError, match=r"^block\.mlp\.experts: ListOfExperts computes its experts in a way that"
    ):
        fold_through(block, mlp, recipe, x)
