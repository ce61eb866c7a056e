"""Observe one block: every planned layer's inputs go through its estimator while the batches pass."""

from collections.abc import Sequence
from contextlib import ExitStack

from dashq.calibration.experts import MixtureWatcher, watching_experts
from dashq.calibration.layers import Fold, Observation, Watcher, watching
from dashq.calibration.sequential import Beside, Original, Stop
from dashq.calibration.stream import Stream
from dashq.model.decoder import Block
from dashq.model.mixtures import find_mixtures
from dashq.recipe.plan import LayerPlan


def observe_block(
    block: Block,
    plans: Sequence[LayerPlan],
    stream: Stream,
    index: int,
    one_pass: bool,
    original: Original | None = None,
    until: str = "",
) -> dict[str, Observation]:
    """What each planned layer of the block sees; with `one_pass` the stream moves on to the next block as it goes.

    Each batch goes through the `original` block first, so that layers can compare; `until` is the last layer to see it.
    """
    folds: list[Fold] = []
    dense = (plan for plan in plans if plan.layer.expert is None)
    watchers = {plan.layer.name: Watcher(plan.layer, plan.scheme.estimator, folds) for plan in dense}
    mixtures = watch_mixtures(block, plans)
    with ExitStack() as stack:
        stack.enter_context(watching(block.linears, watchers))
        for mixture in mixtures:
            stack.enter_context(watching_experts(mixture))
        if original:
            beside = {name: Beside(watcher) for name, watcher in watchers.items()}
            stack.enter_context(watching(original.block.linears, beside))
        for some in [block, *([original.block] if original else [])] if until else []:
            stack.enter_context(watching(some.linears, {until: Stop()}))
        if one_pass:
            stream.advance(block.module, index)
        else:
            stream.observe(block.module, index, (original.stream, original.block.module) if original else None)
    with block.device:  # where estimators start for a layer that the block never called
        observations = {name: watcher.observation() for name, watcher in watchers.items()}
    return observations | {name: seen for mixture in mixtures for name, seen in mixture.observations()}


def watch_mixtures(block: Block, plans: Sequence[LayerPlan]) -> list[MixtureWatcher]:
    """A watcher for each mixture of experts of the block that has a planned layer."""
    planned = {plan.layer.name: plan for plan in plans}
    mixtures = {
        mixture: [planned[name] for key in mixture.matrices if (name := f"{block.name}.{key}") in planned]
        for mixture in find_mixtures(block.module)
    }
    return [MixtureWatcher(block.name, mixture, mine) for mixture, mine in mixtures.items() if mine]
