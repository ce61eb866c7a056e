"""Layers that make up for those quantized before them: their order, and the weights that they should aim at."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from jaxtyping import Float, Int
from torch import Tensor, nn

from dashq.calibration.layers import Observation, watching
from dashq.calibration.stream import Stream
from dashq.model.decoder import Block, Model
from dashq.recipe.plan import LayerPlan

PROBE_TOKENS = 32


@dataclass(frozen=True, eq=False)
class OriginalBlock:
    """The block of the original model that stands beside the quantized one, and the stream that leads to it."""

    stream: Stream
    block: Block

    @classmethod
    def of(cls, stream: Stream, block: Block) -> "OriginalBlock":
        """Takes a copy of the block, whose weights are still the original ones."""
        return cls(stream, replace(block, module=copy.deepcopy(block.module)))


@dataclass(frozen=True, eq=False)
class Stages:
    """The planned layers of a block, in the order in which they are solved.

    `in_order` are layers in the order in which the block calls them; those that are given the same tensor are together.
    `rest` is solved at last, all at once: experts, and layers whose place in the order is not known, or does not count.
    """

    in_order: Sequence[Sequence[LayerPlan]]
    rest: Sequence[LayerPlan]
    called_once: bool = True  # each layer that is in order, in each pass

    def __iter__(self) -> Iterator[Sequence[LayerPlan]]:
        return iter([*self.in_order, self.rest] if self.rest else self.in_order)


def probe_of(model: Model, tokens: Int[Tensor, "samples tokens"]) -> Stream:
    """A stream of a few tokens that is never moved: it tells the order in which blocks call their layers."""
    return Stream(model, tokens[:1, :PROBE_TOKENS])


def sequential_stages(block: Block, plans: Sequence[LayerPlan], probe: Stream) -> Stages:
    """The stages of a block in which each layer sees what those before it have become.

    The order is that of the probe's first batch, of a few tokens; layers that it does not reach are the rest.
    """
    stages: list[tuple[Tensor, list[LayerPlan]]] = []  # each with the tensor that its layers are given
    calls: Counter[str] = Counter()

    def note(plan: LayerPlan, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        """A forward pre-hook of the layer."""
        calls[plan.layer.name] += 1
        if calls[plan.layer.name] > 1:
            return
        for x, stage in stages:
            if x is inputs[0]:
                stage.append(plan)
                return
        stages.append((inputs[0], [plan]))

    with watching(block.linears, {plan.layer.name: partial(note, plan) for plan in plans if plan.layer.expert is None}):
        next(probe.outputs(block))
    rest = [plan for plan in plans if plan.layer.name not in calls]
    return Stages([stage for _, stage in stages], rest, called_once=max(calls.values(), default=1) == 1)


def corrected_target(
    weight: Float[Tensor, "rows columns"], observation: Observation, share: float
) -> Float[Tensor, "rows columns"]:
    """The weight that makes up for `share` of what quantized layers before it changed; see `Curvature.corrected`."""
    if observation.input_shift is None:
        return weight
    return observation.curvature.corrected(weight, observation.input_shift, share)
