"""The laws of tuners: of their optimizer and its steps, and of their loss."""

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.data import Tunable
from dashq.strategies import Tuner
from dashq.testing.comparison import equal
from dashq.testing.examples import Predictions, tunables
from dashq.testing.laws import require

PROGRESS = (0.0, 0.25, 0.5, 0.75)  # of the steps that are tried


def require_optimizer(tuner: Tuner) -> None:
    """The optimizer takes some tunables and nothing else, the same ones on the meta device, and changes none yet."""
    own, planned = tunables(), tunables("meta")
    chosen = _chosen(tuner.optimizer(own), own)
    require(chosen == _chosen(tuner.optimizer(planned), planned), "take the same tunables on the meta device")
    untouched = all(bool((tunable.parameter == 0).all()) for tunable in own)
    require(untouched, "leave parameters as they are before the first step")


def require_steps(tuner: Tuner) -> None:
    """Steps change parameters, keep them finite, and depend on no more than what is saved between two of them."""
    own = tunables()
    optimizer = tuner.optimizer(own)
    chosen = _chosen(optimizer, own)
    for number, progress in enumerate(PROGRESS[:-1]):
        _give_gradients(own, chosen, number)
        tuner.step(optimizer, progress)
    moved = [bool((tunable.parameter != 0).any()) for tunable in own]
    require(any(moved), "change parameters that have gradients")
    finite = all(bool(tunable.parameter.isfinite().all()) for tunable in own)
    require(finite, "keep parameters finite")
    state = optimizer.state_dict()["state"]
    entries = [value for entries in state.values() for value in entries.values()]
    plain = all(isinstance(value, Tensor | int | float | None) for value in entries)
    require(plain, "have an optimizer whose state is tensors and numbers")
    others = tunables()
    for tunable, other in zip(own, others, strict=True):
        other.parameter.data.copy_(tunable.parameter.data)
    resumed = tuner.optimizer(others)
    resumed.load_state_dict({**resumed.state_dict(), "state": copy.deepcopy(state)})
    for members, changing in ((own, optimizer), (others, resumed)):
        _give_gradients(members, chosen, len(PROGRESS))
        tuner.step(changing, PROGRESS[-1])
    same = all(equal(one.parameter.data, other.parameter.data) for one, other in zip(own, others, strict=True))
    require(same, "go on from parameters, the optimizer's state and the progress as if nothing had come between")


def require_loss(tuner: Tuner, example: Predictions) -> None:
    """The loss is one finite number with gradients, the sum over tokens, and a pure function."""
    before = copy.deepcopy(example)
    loss, gradient = _loss(tuner, example, slice(None))
    require(equal(example, before), "leave its inputs as they are")
    require(bool(loss.isfinite()) and bool(gradient.isfinite().all()), "keep its loss and the gradient of it finite")
    again = all(map(equal, _loss(tuner, example, slice(None)), (loss, gradient)))
    require(again, "give the same loss twice")
    if 0 < example.cut < len(example.next_tokens):
        parts = [_loss(tuner, example, part) for part in (slice(example.cut), slice(example.cut, None))]
        total = torch.stack([part for part, _ in parts]).sum()
        near = torch.allclose(total, loss, rtol=1e-4, atol=1e-4)
        joined = torch.cat([part for _, part in parts])
        near = near and torch.allclose(joined, gradient, rtol=1e-4, atol=1e-4)
        require(near, "sum its loss over tokens, however they are cut into pieces")


def _chosen(optimizer: torch.optim.Optimizer, own: Sequence[Tunable]) -> list[int]:
    """The numbers of the tunables that an optimizer changes."""
    chosen = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    numbers = [number for number, tunable in enumerate(own) if id(tunable.parameter) in chosen]
    require(bool(numbers) and len(numbers) == len(chosen), "optimize parameters of the tunables alone, at least one")
    return numbers


def _give_gradients(own: Sequence[Tunable], chosen: Sequence[int], seed: int) -> None:
    """Gradients for all parameters that are changed; the last of several has none, as of an expert without tokens."""
    generator = torch.Generator().manual_seed(seed)
    for number in chosen[:-1] or chosen:
        parameter = own[number].parameter
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def _loss(tuner: Tuner, example: Predictions, part: slice) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens words"]]:
    """The loss of some tokens, and its gradient by the quantized model's logits."""
    quantized = example.quantized[part].clone().requires_grad_()
    loss = tuner.loss(example.original[part], quantized, example.next_tokens[part])
    require(isinstance(loss, Tensor) and loss.shape == (), "give its loss as one number")
    require(loss.requires_grad, "give a loss that depends on the quantized model's logits")
    [gradient] = torch.autograd.grad(loss, quantized)
    return loss.detach(), gradient
