"""Observe one block: every planned layer's inputs go through its estimator while the batches pass."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from jaxtyping import Float
from torch import Tensor

from dashq.calibration.experts import MixtureWatcher, watching_experts
from dashq.calibration.layers import Observation, SharedInputs, Watcher, watching
from dashq.calibration.sequential import OriginalBlock
from dashq.calibration.stream import Stream, stop_forward
from dashq.model.decoder import Block
from dashq.model.mixtures import BlockExperts
from dashq.recipe.plan import LayerPlan


def observe_block(
    block: Block,
    plans: Sequence[LayerPlan],
    stream: Stream,
    one_pass: bool,
    original: OriginalBlock | None = None,
    until: str = "",
) -> dict[str, Observation]:
    """The observation of each planned layer of the block, by name.

    With `one_pass` the stream moves on to the next block as it goes. Otherwise each batch goes through the `original`
    block first, so that layers can compare, and through this one as far as the layer `until`.
    """
    inputs: list[SharedInputs] = []
    dense = (plan for plan in plans if plan.layer.expert is None)
    watchers = {plan.layer.name: Watcher(plan.layer, plan.scheme.estimator, inputs) for plan in dense}
    mixtures = watch_mixtures(block, plans)
    with ExitStack() as stack:
        stack.enter_context(watching(block.linears, {name: watcher.see for name, watcher in watchers.items()}))
        for mixture in mixtures:
            stack.enter_context(watching_experts(mixture))
        if original:
            hooks = {name: watcher.see_original for name, watcher in watchers.items()}
            stack.enter_context(watching(original.block.linears, hooks))
        if until:
            # Attached last, so that the layer's own hooks have seen its inputs before the batch ends.
            stack.enter_context(watching(block.linears, {until: stop_forward}))
        if until and original:
            stack.enter_context(watching(original.block.linears, {until: stop_forward}))
        if one_pass:
            stream.advance(block)
        else:
            stream.observe(block, (original.stream, original.block) if original else None)
    with block.device:  # where estimators start for a layer that the block never called
        observations = {name: watcher.observation() for name, watcher in watchers.items()}
    for mixture in mixtures:
        observations |= mixture.observations()
    return observations


def observe_inputs(
    plans: Sequence[LayerPlan],
    inputs: Iterable[Float[Tensor, "*batch columns"] | None],
    originals: Iterable[Float[Tensor, "*batch columns"] | None],
) -> dict[str, Observation]:
    """The observation of each of some layers that share their inputs, by name, from the inputs of each batch.

    `originals` are what the original model gives these layers for the same batches, or None.
    """
    shared: list[SharedInputs] = []
    for plan in plans:
        if all(other.estimator != plan.scheme.estimator for other in shared):
            shared.append(SharedInputs(plan.layer, plan.scheme.estimator))
    for x, original in zip(inputs, originals, strict=False):
        if x is not None:
            for each in shared:
                each.see(x, original)
    return {
        plan.layer.name: next(each.observation for each in shared if each.estimator == plan.scheme.estimator)
        for plan in plans
    }


def watch_mixtures(block: Block, plans: Sequence[LayerPlan]) -> list[MixtureWatcher]:
    """A watcher for each mixture of experts of the block that has a planned layer."""
    planned = {plan.layer.name: plan for plan in plans}
    watchers = []
    for mixture in BlockExperts(block.module).mixtures:
        names = [f"{block.name}.{name}" for name in mixture.matrices]
        own_plans = [planned[name] for name in names if name in planned]
        if own_plans:
            watchers.append(MixtureWatcher(block.name, mixture, own_plans))
    return watchers
