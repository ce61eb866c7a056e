"""Layers that know what quantized layers before them change: in which order they come, and what they should aim at."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dashq.calibration.layers import Observation, Watcher, watching
from dashq.calibration.stream import StopForward, Stream
from dashq.data import Full
from dashq.model.decoder import Block
from dashq.recipe.plan import LayerPlan

DAMPING = 0.01  # added to the diagonal of H, as a share of its mean, where it is inverted
SMALLEST_CURVATURE = 1e-30  # of a layer that is given nothing but zeros


@dataclass(frozen=True, eq=False)
class Original:
    """The original model beside the quantized one: its stream, and the block that comes next with its own weights."""

    stream: Stream
    block: Block

    @classmethod
    def of(cls, stream: Stream, block: Block) -> "Original":
        """Takes a copy of the block, whose weights are still the original ones."""
        return cls(stream, replace(block, module=copy.deepcopy(block.module)))


@dataclass(frozen=True, eq=False)
class Beside:
    """Shows a layer's watcher what the same layer of the original model is given, batch by batch."""

    watcher: Watcher

    def see(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook of the original layer."""
        self.watcher.original = inputs[0]


class Stop:
    """Ends a batch's way through a block at the layer that this is attached to."""

    def see(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook."""
        raise StopForward


@dataclass(frozen=True, eq=False)
class Turn:
    """Notes when a layer's turn comes: with others that are given the same tensor, or next."""

    plan: LayerPlan
    stages: list[tuple[Tensor, list[LayerPlan]]]

    def see(self, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook."""
        if any(self.plan in stage for _, stage in self.stages):
            return
        mine = next((stage for x, stage in self.stages if x is inputs[0]), None)
        if mine is None:
            self.stages.append((inputs[0], [self.plan]))
        else:
            mine.append(self.plan)


def in_sequence(block: Block, plans: Sequence[LayerPlan], stream: Stream, index: int) -> list[list[LayerPlan]]:
    """The planned layers in the order in which the block calls them, together those that are given the same tensor.

    The first batch tells. Experts come last, all together, with whatever it does not reach.
    """
    stages: list[tuple[Tensor, list[LayerPlan]]] = []
    turns = {plan.layer.name: Turn(plan, stages) for plan in plans if plan.layer.expert is None}
    with watching(block.linears, turns):
        next(stream.outputs(block.module, index))
    reached = [stage for _, stage in stages]
    left = [plan for plan in plans if not any(plan in stage for stage in reached)]
    return [*reached, left] if left else reached


def corrected_target(
    weight: Float[Tensor, "rows columns"], observation: Observation, share: float
) -> Float[Tensor, "rows columns"]:
    """W + share · W D (H + λ)⁻¹: what gives, of the changed inputs x̂, most nearly what W gives of the original x.

    With D the mean of (x - x̂) x̂ᵀ, shrunk to its diagonal as H is; a diagonal curvature knows only that diagonal.
    """
    input_shift, curvature = observation.input_shift, observation.curvature
    if input_shift is None:
        return weight
    h = curvature.diagonal()
    damping = (DAMPING * h.mean()).clamp_min(SMALLEST_CURVATURE)
    if not isinstance(curvature, Full):
        return weight * (1 + share * input_shift.diagonal() / (h + damping))
    shrunk = torch.lerp(input_shift, torch.diag(input_shift.diagonal()), curvature.shrinkage)
    damped = curvature.matrix + damping * torch.eye(len(h), device=h.device)
    correction: Tensor = torch.linalg.solve(damped, (weight @ shrunk).T).T
    return weight + share * correction
