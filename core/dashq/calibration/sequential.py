"""Layers that make up for those quantized before them: their order, and the weights that they should aim at."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from dashq.calibration.layers import Observation, watching
from dashq.calibration.stream import Stream
from dashq.model.decoder import Block
from dashq.recipe.plan import LayerPlan


@dataclass(frozen=True, eq=False)
class OriginalBlock:
    """The block of the original model that stands beside the quantized one, and the stream that leads to it."""

    stream: Stream
    block: Block

    @classmethod
    def of(cls, stream: Stream, block: Block) -> "OriginalBlock":
        """Takes a copy of the block, whose weights are still the original ones."""
        return cls(stream, replace(block, module=copy.deepcopy(block.module)))


def sequential_stages(block: Block, plans: Sequence[LayerPlan], stream: Stream) -> list[list[LayerPlan]]:
    """The planned layers in the order in which the block calls them; those that are given the same tensor are together.

    The order is that of the first batch. Experts come last, all together, with the layers that it does not reach.
    """
    stages: list[tuple[Tensor, list[LayerPlan]]] = []  # each with the tensor that its layers are given

    def note(plan: LayerPlan, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook of the layer."""
        if any(plan in stage for _, stage in stages):
            return
        for x, stage in stages:
            if x is inputs[0]:
                stage.append(plan)
                return
        stages.append((inputs[0], [plan]))

    with watching(block.linears, {plan.layer.name: partial(note, plan) for plan in plans if plan.layer.expert is None}):
        next(stream.outputs(block))
    reached = [stage for _, stage in stages]
    rest = [plan for plan in plans if not any(plan in stage for stage in reached)]
    return [*reached, rest] if rest else reached


def corrected_target(
    weight: Float[Tensor, "rows columns"], observation: Observation, share: float
) -> Float[Tensor, "rows columns"]:
    """The weight that makes up for `share` of what quantized layers before it changed; see `Curvature.corrected`."""
    if observation.input_shift is None:
        return weight
    return observation.curvature.corrected(weight, observation.input_shift, share)
