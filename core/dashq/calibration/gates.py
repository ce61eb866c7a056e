"""The routing of one batch of tokens by a mixture, read off the inputs of its router and its experts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor
from torch.nn import functional

from dashq.errors import CheckpointError
from dashq.model.mixtures import Mixture, StackedMixture, indexed_arguments

Gate = Callable[[Tensor], Tensor]
# Each turns a router's scores into probabilities. The last leaves those alone that are probabilities already.
GATES: tuple[Gate, ...] = (partial(torch.softmax, dim=-1), torch.sigmoid, torch.relu)
GATE_TOLERANCE = 0.02  # of an expert's share, on average; what is not the gate is off by much more
CHECKED_TOKENS = 8
CHECK_TOLERANCE = 0.05  # wide enough for bfloat16; what is misunderstood is off by much more


@dataclass(frozen=True, eq=False)
class Routing:
    """One batch of tokens, with each expert's probability and whether the model chose it.

    Where it is `scaled`, experts are given hidden states times their probability.
    """

    hidden: Float[Tensor, "tokens columns"]
    probabilities: Float[Tensor, "tokens experts"]
    chosen: Bool[Tensor, "tokens experts"]
    scaled: bool = False

    def expert_input(self, expert: int, tokens: Int64[Tensor, " part"]) -> Float[Tensor, "part columns"]:
        """The input of the expert if it is given these tokens."""
        x = self.hidden[tokens]
        return x * self.probabilities[tokens, expert, None].to(x.dtype) if self.scaled else x


@dataclass(frozen=True, eq=False)
class RouterCall:
    """A router's input, and its scores before softmax or sigmoid."""

    hidden: Float[Tensor, "tokens columns"]
    scores: Float[Tensor, "tokens experts"]


def router_call(name: str, mixture: Mixture, inputs: Float[Tensor, "*batch columns"], output: Any) -> RouterCall:
    """The call of a router that returns its scores, alone or with other tensors, or else multiplies by one matrix.

    Raises `CheckpointError` where neither gives scores [tokens, experts].
    """
    x = inputs.reshape(-1, inputs.shape[-1])
    outputs = output if isinstance(output, tuple | list) else (output,)
    shape = (len(x), mixture.count)
    scores = [
        value.reshape(shape)
        for value in outputs
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() == len(x) * mixture.count
    ]
    if scores:  # where there are probabilities too, it is the logits that go below zero
        return RouterCall(x, min(scores, key=lambda value: float(value.min())).float())
    for weight in mixture.router.parameters():
        if tuple(weight.shape) == (mixture.count, x.shape[1]):
            return RouterCall(x, functional.linear(x.float(), weight.float()))
    raise CheckpointError(f"{name}: the router {type(mixture.router).__name__} tells no scores [tokens, experts]")


def indexed(inputs: list[Shaped[Tensor, "..."]], router: RouterCall) -> tuple[Routing, Float[Tensor, "tokens experts"]]:
    """The routing where experts are given hidden states, the chosen experts of each token, and their weights.

    Returned beside it are the weights by which the model adds up the experts' outputs.
    """
    logits = router.scores
    hidden, index, weights = indexed_arguments(inputs)
    # From [tokens, chosen experts] to [tokens, experts].
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, index, True)
    dense = torch.zeros_like(logits).scatter_add_(1, index, weights.float())
    gate = find_gate(logits, dense, chosen)
    return Routing(hidden, gate(logits) if gate else dense, chosen), dense


def dispatched(
    mixture: Mixture, x: Float[Tensor, "*batch columns"], router: RouterCall
) -> tuple[Routing, Float[Tensor, "tokens experts"]]:
    """The routing where experts are given all tokens, each times its probability, or zeros where they are not chosen.

    Returned beside it are the weights by which the model adds up the experts' outputs: 1 for those that are chosen.
    """
    hidden, logits = router.hidden, router.scores
    inputs = x.reshape(mixture.count, -1, x.shape[-1])
    chosen = (inputs != 0).any(-1).T
    # An expert's input is a multiple of the hidden states h: the factor is their product with h, over hᵀh.
    lengths = hidden.float().square().sum(-1, keepdim=True).clamp_min(1e-20)
    factors = (inputs.float() * hidden.float()).sum(-1).T / lengths * chosen
    gate = find_gate(logits, factors, chosen)
    return Routing(hidden, gate(logits) if gate else factors, chosen, scaled=True), chosen.float()


def find_gate(
    scores: Float[Tensor, "tokens experts"],
    weights: Float[Tensor, "tokens experts"],
    chosen: Bool[Tensor, "tokens experts"],
) -> Gate | None:
    """The gate that turns the scores into probabilities, recognized by the weights of the chosen experts.

    Compared are shares of a token's sum, since models may divide by it; where each token has one expert, whose share
    is always 1, the weights themselves. None where the weights are no function of an expert's own score, as in
    Phi-3.5-MoE: then they are all there is to know.
    """
    single = int(chosen.sum(1).max()) == 1

    def shares(values: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        masked = values * chosen
        return masked if single else masked / masked.sum(1, keepdim=True).clamp_min(1e-20)

    def misfit(gate: Gate) -> float:
        return float((shares(gate(scores)) - shares(weights)).abs().sum() / chosen.sum().clamp_min(1))

    best = min(GATES, key=misfit)
    return best if misfit(best) < GATE_TOLERANCE else None


def other_computation(name: str, mixture: Mixture) -> CheckpointError:
    """The error that says that the experts do something else than they look like."""
    kind = mixture.experts if isinstance(mixture, StackedMixture) else mixture.parent
    return CheckpointError(
        f"{name}: {type(kind).__name__} computes its experts in a way that is not understood; "
        "to leave them as they are, add an override that matches them with `skip: true`"
    )


def row_keys(x: Float[Tensor, "tokens columns"]) -> Int64[Tensor, " tokens"]:
    """One number for each row, the same for rows that are equal bit by bit, and hardly ever for others.

    Each is the sum, modulo 2⁶⁴, of the row's bit patterns times random factors, the same in every call.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (x.shape[1],), generator=generator).to(x.device)
    bits = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    return (bits.long() * factors).sum(-1)
