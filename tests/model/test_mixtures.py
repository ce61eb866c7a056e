"""Mixtures are found in a block by the forms of their weights, and what looks like one and is none is named."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from dashq.model import mixtures
from dashq.model.decoder import block_matrices
from dashq.model.mixtures import BlockExperts
from dashq.quantizing.opening import open_model
from family_results import FamilyResults
from pico import MIXTURES
from recipes import mixture_recipe


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


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_and_gates_are_no_layers(family: str, families: FamilyResults, tmp_path: Path) -> None:
    model = open_model(mixture_recipe(families.model(family), tmp_path / "out"))
    names = {layer.name for layer in model.layers()}
    gates = ("mlp.gate", "mlp.router", "feed_forward.router", "shared_expert_gate")
    assert not [name for name in names if name.endswith(gates)]
    assert not model.unclear_weights()
    counted = sum(layer.rows * layer.columns for layer in model.layers())
    blocks = [model.network.get_submodule(block) for block in model.blocks]
    matrices = sum(p.numel() for b in blocks for n, p in b.named_parameters() if p.dim() > 1 and _is_matrix(n))
    kept = sum(p.numel() for b in blocks for n, p in b.named_parameters() if p.dim() == 2 and _is_gate(n))
    assert counted == matrices - kept


def _is_matrix(name: str) -> bool:
    return "bias" not in name and not name.endswith(("conv.weight", "conv1d.weight", "A_log"))


def _is_gate(name: str) -> bool:
    return name.endswith((".gate.weight", ".router.weight", ".router.layer.weight", ".shared_expert_gate.weight"))


def test_a_block_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[nn.Module] = []
    search = mixtures._candidates

    def counted_search(block: nn.Module) -> Iterator[mixtures.Candidate]:
        searches.append(block)
        return search(block)

    monkeypatch.setattr(mixtures, "_candidates", counted_search)
    assert block_matrices(Mixed(Stack(), rows=4)).keys() > {"experts.down_proj.0"}
    assert len(searches) == 1


def test_experts_without_a_router_are_named() -> None:
    reasons = BlockExperts(Mixed(Stack(), rows=5)).not_understood
    assert reasons.keys() == {"experts.gate_up_proj", "experts.down_proj"}
    assert "whose router is not found: no weight of 4 rows beside them" in reasons["experts.down_proj"]
    modules = nn.ModuleList(nn.Sequential(nn.Linear(16, 16)) for _ in range(4))
    listed = BlockExperts(Mixed(modules, rows=5)).not_understood
    assert set(listed) == {f"experts.{expert}.0" for expert in range(4)}


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            transformers.DbrxConfig(
                n_layers=1,
                ffn_config={"hidden_size": 48, "ffn_hidden_size": 32, "moe_num_experts": 4},
                attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
                d_model=48,
                n_heads=4,
            ),
            {f"ffn.experts.mlp.{name}" for name in ("w1", "v1", "w2")},
        ),
        (
            transformers.JetMoeConfig(
                num_hidden_layers=1, hidden_size=48, kv_channels=16, num_key_value_heads=2, num_local_experts=4
            ),
            {
                f"{mixture}.{name}_linear.weight"
                for mixture in ("mlp", "self_attention.experts")
                for name in ("input", "output")
            },
        ),
    ],
    ids=["flat", "other names"],
)
def test_experts_kept_in_other_ways_are_named(config: Any, names: set[str]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    (block,) = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    assert not BlockExperts(block).mixtures
    assert BlockExperts(block).not_understood.keys() == names
    assert all("of experts of unknown form" in reason for reason in BlockExperts(block).not_understood.values())


def test_a_convolution_is_no_mixture() -> None:
    block = nn.Module()
    block.mixed, block.conv1d = Mixed(Stack(), rows=4), nn.Conv1d(48, 48, 4, groups=48)
    assert [mixture.name for mixture in BlockExperts(block).mixtures] == ["mixed.experts"]
    assert not BlockExperts(block).not_understood


def test_stacks_of_another_form_are_named() -> None:
    more = Mixed(Stack(gate_up=(6, 64, 16)), rows=6)  # experts without a second matrix
    assert not BlockExperts(more).mixtures
    assert (
        "a weight of shape [6, 64, 16] that looks like one of experts of unknown form"
        in BlockExperts(more).not_understood["experts.gate_up_proj"]
    )
    strange = Mixed(Stack(down=(4, 16, 31)), rows=4)
    assert not BlockExperts(strange).mixtures
    assert (
        "a weight of shape [4, 16, 31] that looks like one of experts of unknown form"
        in BlockExperts(strange).not_understood["experts.down_proj"]
    )
    assert BlockExperts(strange).gates == {"gate"}
