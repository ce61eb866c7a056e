"""The laws of tuners hold for the plainest one, and each notices what only it can see."""

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from dashq import Tunable, Tuner
from dashq.testing.examples import Predictions, tunables
from dashq.testing.laws import BrokenLaw
from dashq.testing.tuners import require_loss, require_optimizer, require_steps

EXAMPLE = Predictions(torch.zeros(2, 3), torch.eye(2, 3), torch.tensor([0, 2]), cut=1)


class Plain(Tuner):
    """Gradient descent on every change, by squared differences of logits."""

    name = "plain"

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        return torch.optim.SGD([tunable.parameter for tunable in tunables], lr=0.1)

    def loss(self, original: Tensor, quantized: Tensor, next_tokens: Tensor) -> Tensor:
        return (original - quantized).square().sum()


class BeginsElsewhere(Plain):
    name = "begins_elsewhere"

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        for tunable in tunables:
            torch.nn.init.ones_(tunable.parameter)
        return super().optimizer(tunables)


class ChoosesByDevice(Plain):
    name = "chooses_by_device"

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        planned = tunables[0].parameter.device.type == "meta"
        return super().optimizer(tunables[1:] if planned else tunables)


class KeepsWords(Plain):
    name = "keeps_words"

    def step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        optimizer.step()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["what"] = {"done": "a step"}


class DrawsNoise(Plain):
    name = "draws_noise"

    def loss(self, original: Tensor, quantized: Tensor, next_tokens: Tensor) -> Tensor:
        return super().loss(original + torch.rand(()), quantized, next_tokens)


def loss_of_the_example(tuner: Tuner) -> None:
    require_loss(tuner, EXAMPLE)


LAWS: list[Callable[[Tuner], None]] = [require_optimizer, require_steps, loss_of_the_example]


@pytest.mark.parametrize("law", LAWS)
def test_gradient_descent_keeps_every_law(law: Callable[[Tuner], None]) -> None:
    law(Plain())


@pytest.mark.parametrize(
    ("law", "tuner", "message"),
    [
        (require_optimizer, BeginsElsewhere(), "leave parameters as they are before the first step"),
        (require_optimizer, ChoosesByDevice(), "take the same tunables on the meta device"),
        (require_steps, KeepsWords(), "have an optimizer whose state is tensors and numbers"),
        (loss_of_the_example, DrawsNoise(), "give the same loss twice"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_law_that_is_broken_is_told(law: Callable[[Tuner], None], tuner: Tuner, message: str) -> None:
    with pytest.raises(BrokenLaw, match=re.escape(message)):
        law(tuner)


def test_an_example_has_every_kind_of_change_and_none_is_made_yet() -> None:
    assert {tunable.kind for tunable in tunables()} == {"scale", "offset", "norm"}
    assert all(bool((tunable.parameter == 0).all()) for tunable in tunables())
    assert [tunable.name for tunable in tunables()] == [tunable.name for tunable in tunables("meta")]
