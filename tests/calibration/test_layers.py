"""Layers that are given the same tensor share one estimate, and nothing else does."""

import pytest
import torch
from torch import Tensor, nn

from dashq import Estimator, Layer
from dashq.calibration.layers import Observation, SharedInputs, Watcher, watching
from dashq.errors import CheckpointError
from recipes import REGISTRY

DIAGONAL: Estimator = REGISTRY.estimators["diagonal"].model_validate({})
DAMPED: Estimator = REGISTRY.estimators["diagonal"].model_validate({"damping": 0.5})
FULL: Estimator = REGISTRY.estimators["full"].model_validate({})


class Attention(nn.Module):
    """Three projections of one tensor, the second of them now and then of a copy, and one of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6, bias=False) for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x: Tensor, copied: bool = False) -> Tensor:
        output: Tensor = self.o(self.q(x) * self.k(x.clone() if copied else x).softmax(-1) + self.v(x))
        return output


def watch(estimators: dict[str, Estimator], *copied: bool) -> tuple[dict[str, Observation], Tensor]:
    """What is learned from as many batches; and all their tokens."""
    block, batches = Attention(), torch.randn(len(copied), 3, 5, 6, generator=torch.Generator().manual_seed(0))
    inputs: list[SharedInputs] = []
    layers = {name: Layer(name=name, rows=6, columns=6) for name in estimators}
    watchers = {name: Watcher(layers[name], estimator, inputs) for name, estimator in estimators.items()}
    modules = {name: block.get_submodule(name) for name in estimators}
    with watching(modules, {name: watcher.see for name, watcher in watchers.items()}):
        for batch, copy in zip(batches, copied, strict=True):
            block(batch, copy)
    return {name: watcher.observation() for name, watcher in watchers.items()}, batches.flatten(0, 2)


def test_layers_that_are_given_the_same_tensor_share_one_estimate() -> None:
    observations, x = watch(dict.fromkeys("qkvo", FULL), False, False)
    assert observations["q"] is observations["k"] is observations["v"] is not observations["o"]
    assert observations["q"].tokens == observations["o"].tokens == len(x)
    torch.testing.assert_close(observations["q"].curvature.diagonal(), x.square().mean(0))


def test_layers_with_other_estimators_have_their_own() -> None:
    observations, x = watch({"q": DIAGONAL, "k": DAMPED, "v": DIAGONAL}, False)
    assert observations["q"] is observations["v"]
    squares = x.square().mean(0)
    torch.testing.assert_close(observations["k"].curvature.diagonal(), squares + 0.5 * squares.mean())


def test_equal_values_in_another_tensor_are_seen_apart() -> None:
    observations, _ = watch(dict.fromkeys("qk", DIAGONAL), True, True)
    assert observations["q"] is not observations["k"]
    assert observations["q"].curvature.diagonal().equal(observations["k"].curvature.diagonal())


def test_layers_that_share_their_inputs_at_first_only_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^k is given the inputs of q in some batches only"):
        watch(dict.fromkeys("qk", DIAGONAL), False, True)


def test_a_layer_that_is_never_called_has_seen_no_token() -> None:
    observations = Watcher(Layer(name="idle", rows=6, columns=6), DIAGONAL, []).observation()
    assert observations.tokens == 0
    assert not observations.curvature.diagonal().any()
