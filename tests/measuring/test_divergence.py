"""The divergence of a layer: from the whole model in memory, with that layer alone quantized, and without a trace."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from analyses import analysis, measured
from dashq import Grid, Grouping, Quantized
from dashq.measuring.divergence import confirm, divergences, rank_correlation
from dashq.solving.arithmetic import round_to_nearest
from family_results import FamilyResults

GRID = Grid(bits=2, dtype=torch.float16)
WINDOWS = torch.arange(2 * 20).reshape(2, 20)
BLOCKS = [f"model.layers.{index}" for index in range(3)]
UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj"


def network_of(folder: Path) -> PreTrainedModel:
    network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return network


@pytest.fixture(scope="module")
def network(model: Path) -> PreTrainedModel:
    return network_of(model)


def coarse(weight: Tensor) -> Quantized:
    grouping = Grouping(columns=weight.shape[1], size=16)
    return round_to_nearest(grouping.split(weight), GRID, grouping)


def lost(original: PreTrainedModel, changed: PreTrainedModel) -> float:
    """The Kullback-Leibler divergence of the predictions in nats per token, by its definition."""
    with torch.no_grad():
        p, q = (network(WINDOWS).logits.double().log_softmax(-1) for network in (original, changed))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_it_is_that_of_each_layer_alone(network: PreTrainedModel, model: Path) -> None:
    quantized = {name: coarse(network.get_parameter(f"{name}.weight").detach()) for name in (UP, DOWN)}
    losses = divergences(network, BLOCKS, quantized, WINDOWS)
    assert list(losses) == [DOWN, UP]  # as the blocks have them
    for name, layer in quantized.items():
        changed = network_of(model)
        changed.get_parameter(f"{name}.weight").data.copy_(layer.dequantize())
        assert losses[name] == pytest.approx(lost(network, changed), rel=1e-3)


def test_an_expert_is_changed_alone(families: FamilyResults) -> None:
    network, changed = (network_of(families.model("mixtral")) for _ in range(2))
    stack = "model.layers.0.mlp.experts.down_proj"
    layer = coarse(network.get_parameter(stack)[2].detach())
    changed.get_parameter(stack).data[2] = layer.dequantize()
    losses = divergences(network, BLOCKS, {f"{stack}.2": layer}, WINDOWS)
    assert losses == {f"{stack}.2": pytest.approx(lost(network, changed), rel=1e-3)}


def test_it_leaves_no_trace_and_tells_each_layer_that_is_done(network: PreTrainedModel) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    quantized = {name: coarse(network.get_parameter(f"{name}.weight").detach()) for name in (UP, DOWN)}
    done: list[int] = []
    divergences(network, BLOCKS, quantized, WINDOWS, done.append)
    assert done == [1, 2]
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())


def test_what_is_not_quantized_or_changes_nothing_loses_nothing(network: PreTrainedModel) -> None:
    assert divergences(network, BLOCKS, {}, WINDOWS) == {}
    same = coarse(coarse(network.get_parameter(f"{UP}.weight").detach()).dequantize())
    weight = network.get_parameter(f"{UP}.weight")
    original = weight.detach().clone()
    weight.data.copy_(same.dequantize())
    assert divergences(network, BLOCKS, {UP: same}, WINDOWS) == {UP: pytest.approx(0.0, abs=1e-9)}
    weight.data.copy_(original)


def test_an_analysis_is_confirmed_layer_by_layer_and_by_the_order_of_the_layers(network: PreTrainedModel) -> None:
    quantized = {name: coarse(network.get_parameter(f"{name}.weight").detach()) for name in (UP, DOWN)}
    losses = divergences(network, BLOCKS, quantized, WINDOWS)
    expected = sorted(losses.values())
    for costs, correlation in ((expected, 1.0), (expected[::-1], -1.0)):
        ranked = dict(zip(sorted(losses, key=lambda name: losses[name]), costs, strict=True))
        confirmed = confirm(
            analysis([measured(name, {2: cost}) for name, cost in ranked.items()]), network, BLOCKS, quantized, WINDOWS
        )
        assert {layer.name: layer.divergence for layer in confirmed.layers} == losses
        assert confirmed.rank_correlation == pytest.approx(correlation)


@given(st.lists(st.integers(-9, 9), min_size=2, max_size=9, unique=True))
def test_rank_correlation_sees_only_the_order(values: list[int]) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    assert rank_correlation(x.tolist(), x.exp().tolist()) == pytest.approx(1)
    assert rank_correlation(x.tolist(), (-(x**3)).tolist()) == pytest.approx(-1)


def test_equal_values_share_their_ranks() -> None:
    # Ranks 1.5, 1.5, 3 and 1, 2, 3: their deviations are -½, -½, 1 and -1, 0, 1.
    assert rank_correlation([5.0, 5.0, 7.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)


@pytest.mark.parametrize(("x", "y"), [([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]), ([1.0, 2.0], [0.0, 0.0]), ([1.0], [1.0])])
def test_there_is_none_where_nothing_differs(x: list[float], y: list[float]) -> None:
    assert rank_correlation(x, y) is None
