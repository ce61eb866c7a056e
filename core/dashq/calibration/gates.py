"""How a mixture sent the tokens of one batch to its experts, read off its router's and its experts' inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from dashq.errors import CheckpointError
from dashq.model.mixtures import Mixture, StackedMixture

Gate = Callable[[Tensor], Tensor]
# What turns a router's scores into probabilities. The last leaves those alone that are probabilities already.
GATES: tuple[Gate, ...] = (partial(torch.softmax, dim=-1), torch.sigmoid, torch.relu)
GATE_TOLERANCE = 0.02  # of an expert's share, on average; what is not the gate is off by much more
CHECKED_TOKENS = 8
CHECK_TOLERANCE = 0.05  # wide enough for bfloat16; what is misunderstood is off by much more


@dataclass(frozen=True, eq=False)
class Routing:
    """How a mixture routed one batch. `scaled`: its experts are given hidden states times their probability."""

    hidden: Float[Tensor, "tokens columns"]
    probabilities: Float[Tensor, "tokens experts"]
    chosen: Bool[Tensor, "tokens experts"]
    scaled: bool = False

    def given(self, expert: int, tokens: Int64[Tensor, " tokens"]) -> Float[Tensor, "tokens columns"]:
        """What the expert is given, were it given these tokens."""
        x = self.hidden[tokens]
        return x * self.probabilities[tokens, expert, None].to(x.dtype) if self.scaled else x


def router_logits(name: str, mixture: Mixture, x: Tensor, output: Any) -> tuple[Tensor, Tensor]:
    """A router's input and its scores before softmax or sigmoid, both by token."""
    x = x.reshape(-1, x.shape[-1])
    outputs = output if isinstance(output, tuple | list) else (output,)
    shape = (len(x), mixture.count)
    scores = [
        value.reshape(shape)
        for value in outputs
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() == len(x) * mixture.count
    ]
    if scores:  # where there are probabilities too, it is the logits that go below zero
        return x, min(scores, key=lambda value: float(value.min())).float()
    for weight in mixture.router.parameters():
        if tuple(weight.shape) == (mixture.count, x.shape[1]):
            return x, functional.linear(x.float(), weight.float())
    raise CheckpointError(f"{name}: the router {type(mixture.router).__name__} tells no scores [tokens, experts]")


def indexed(inputs: list[Tensor], logits: Tensor) -> tuple[Routing, Tensor]:
    """Experts that are given hidden states, the chosen experts of each token, and their weights."""
    hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
    index = next(value for value in inputs[1:] if not value.is_floating_point()).reshape(len(hidden), -1)
    weights = next(value for value in inputs[1:] if value.is_floating_point()).reshape(index.shape).float()
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index, True)
    dense = torch.zeros_like(logits).scatter_add_(1, index, weights)
    gate = find_gate(logits, dense, chosen)
    return Routing(hidden, gate(logits) if gate else dense, chosen), dense


def dispatched(mixture: Mixture, x: Tensor, hidden: Tensor, logits: Tensor) -> tuple[Routing, Tensor]:
    """Experts that are given all tokens, each times its probability, and zeros where they were not chosen."""
    given = x.reshape(mixture.count, -1, x.shape[-1])
    chosen = (given != 0).any(-1).T
    lengths = hidden.float().square().sum(-1, keepdim=True).clamp_min(1e-20)
    factors = (given.float() * hidden.float()).sum(-1).T / lengths * chosen
    gate = find_gate(logits, factors, chosen)
    return Routing(hidden, gate(logits) if gate else factors, chosen, scaled=True), chosen.float()


def find_gate(
    scores: Float[Tensor, "tokens experts"],
    weights: Float[Tensor, "tokens experts"],
    chosen: Bool[Tensor, "tokens experts"],
) -> Gate | None:
    """What turns the scores into probabilities, as the weights tell that the model gives to its chosen experts.

    Models may divide them by their sum; where a token has one expert that would leave nothing to tell by. None where
    the weights are no function of an expert's own score, as in Phi-3.5-MoE: then they are all there is to know.
    """
    single = int(chosen.sum(1).max()) == 1

    def shares(values: Tensor) -> Tensor:
        masked = values * chosen
        return masked if single else masked / masked.sum(1, keepdim=True).clamp_min(1e-20)

    def misfit(gate: Gate) -> float:
        return float((shares(gate(scores)) - shares(weights)).abs().sum() / chosen.sum().clamp_min(1))

    best = min(GATES, key=misfit)
    return best if misfit(best) < GATE_TOLERANCE else None


def not_understood(name: str, mixture: Mixture) -> CheckpointError:
    """The error that says that the experts do something else than they look like."""
    kind = mixture.experts if isinstance(mixture, StackedMixture) else mixture.parent
    return CheckpointError(
        f"{name}: {type(kind).__name__} computes its experts in a way that is not understood; "
        "to leave them as they are, add an override that matches them with `skip: true`"
    )


def row_keys(x: Float[Tensor, "tokens columns"]) -> Int64[Tensor, " tokens"]:
    """Equal rows, bit by bit, have equal keys."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (x.shape[1],), generator=generator).to(x.device)
    bits = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return (bits.long() * factors).sum(-1)
