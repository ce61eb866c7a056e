"""Mixtures of experts for tests: their recipes, and blocks that hold them stacked and in lists."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dashq import make_plan
from dashq.calibration.experts import MixtureWatcher, watching_experts
from dashq.data import Layer
from dashq.model.mixtures import find_mixtures
from pico import pico_model
from recipes import build_recipe, small_scheme


def mixture_scheme(**changes: Any) -> dict[str, Any]:
    """The scheme of `small_recipe` for models with experts."""
    return small_scheme(**({"solver": "rtn", "router": "routed", "pooling_tokens": 0} | changes))


def mixture_recipe(family: str, folder: Path, **changes: Any) -> Any:
    model = pico_model(family, folder / "model")
    return build_recipe(model, folder / "out", dtype="float32", scheme=mixture_scheme(**changes))


class Stack(nn.Module):
    """Experts as transformers stacks them."""

    def __init__(self, gate_up: tuple[int, ...] = (4, 64, 16), down: tuple[int, ...] = (4, 16, 32)) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(gate_up)), nn.Parameter(torch.zeros(down))


class Mixed(nn.Module):
    """A block with experts, and with a router of so many rows."""

    def __init__(self, experts: nn.Module, rows: int) -> None:
        super().__init__()
        self.experts, self.gate = experts, nn.Linear(16, rows)


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
    (mixture,) = find_mixtures(block)
    layers = [
        Layer(name=f"block.{name}", rows=32, columns=32 if "down" in name else 48, expert=matrix.expert)
        for name, matrix in mixture.matrices.items()
    ]
    watcher = MixtureWatcher("block", mixture, make_plan(recipe, layers))
    with torch.no_grad(), watching_experts(watcher):
        part(x)
    return dict(watcher.observations())
