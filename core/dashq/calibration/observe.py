"""Observe one block: every planned layer's inputs go through its estimator while the batches pass."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.calibration.experts import MixtureWatcher, watching_experts
from dashq.calibration.layers import Observation, SharedInputs, Watcher, watching
from dashq.calibration.sequential import OriginalBlock
from dashq.calibration.stream import Stream, stop_forward
from dashq.calibration.strips import solvers_of
from dashq.errors import CheckpointError
from dashq.model.decoder import Block
from dashq.model.mixtures import BlockExperts
from dashq.processes.group import here
from dashq.recipe.plan import LayerPlan


def observe_block(
    block: Block,
    plans: Sequence[LayerPlan],
    stream: Stream,
    one_pass: bool,
    original: OriginalBlock | None = None,
    until: str = "",
    end_share: Callable[[], None] = lambda: None,
) -> dict[str, Observation]:
    """The observation of each planned layer of the block, by name; among several processes, of those that this one has
    a part in solving.

    With `one_pass` the stream moves on to the next block as it goes. Otherwise each batch goes through the `original`
    block first, so that layers can compare, and through this one as far as the layer `until`. `end_share` is called
    behind each share of the samples.
    """
    inputs: list[SharedInputs] = []
    dense = (plan for plan in plans if plan.layer.expert is None)
    watchers = {plan.layer.name: Watcher(plan.layer, plan.scheme.estimator, inputs) for plan in dense}
    mixtures = watch_mixtures(block, plans, stream.share_count)
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
        first = (original.stream, original.block) if original else None
        for share in stream.shares:
            if one_pass:
                stream.advance(block, share)
            else:
                stream.observe(block, first, share)
            for shared in inputs:
                shared.fold.end_share()
            for mixture in mixtures:
                mixture.end_share()
            end_share()
    solvers = solvers_of(plans, here().count)
    with block.device:  # where estimators start for a layer that the block never called
        if stream.is_spread:
            _collect(watchers, solvers, block.device)
            for mixture in mixtures:
                mixture.collect(solvers, block.device)
        observations = {
            name: watcher.observation() for name, watcher in watchers.items() if is_solved_here(solvers[name], stream)
        }
    for mixture in mixtures:
        own = [name for name in mixture.names if is_solved_here(solvers[name], stream)]
        observations |= mixture.observations(own)
    return observations


def observe_inputs(
    plans: Sequence[LayerPlan],
    inputs: Iterable[Float[Tensor, "*batch columns"] | None],
    originals: Iterable[Float[Tensor, "*batch columns"] | None],
    stream: Stream,
) -> dict[str, Observation]:
    """The observation of each of some layers that share their inputs, by name, from the inputs of each batch.

    `originals` are what the original model gives these layers for the same batches of the `stream`, or None. Among
    several processes, the observations are those of the layers that this one has a part in solving.
    """
    shared: list[SharedInputs] = []
    for plan in plans:
        if all(other.estimator != plan.scheme.estimator for other in shared):
            shared.append(SharedInputs(plan.layer, plan.scheme.estimator))
    pairs = zip(inputs, originals, strict=False)
    for share in stream.shares:
        for x, original in islice(pairs, len(share)):
            if x is not None:
                for each in shared:
                    each.see(x, original)
        for each in shared:
            each.fold.end_share()
    solvers = solvers_of(plans, here().count)
    names = {each: [plan.layer.name for plan in plans if plan.scheme.estimator == each.estimator] for each in shared}
    if stream.is_spread:
        for each in shared:
            each.collect({rank for name in names[each] for rank in solvers[name]}, stream.device)
    return {name: each.observation for each in shared for name in names[each] if is_solved_here(solvers[name], stream)}


def is_solved_here(solvers: Collection[int], stream: Stream) -> bool:
    """True for a layer of which this process solves a strip; for every layer, where it observes all samples."""
    return not stream.is_spread or here().rank in solvers


def _collect(watchers: Mapping[str, Watcher], solvers: Mapping[str, Sequence[int]], device: torch.device) -> None:
    """Let every process that solves a layer know what all have seen of its inputs.

    Layers share their inputs as they do in any process. Raises a `CheckpointError` where processes see them shared in
    different ways.
    """
    seen = here().of_all({name: watcher.called for name, watcher in watchers.items()})
    sharing: dict[str, list[str]] = defaultdict(list)
    for name in watchers:
        first, *others = [*dict.fromkeys(called[name] for called in seen if called[name])] or [name]
        if others:
            raise CheckpointError(f"{name} is given the inputs of {first} in some batches only: not supported")
        sharing[first].append(name)
    for first, names in sharing.items():
        inputs = watchers[first].inputs
        inputs.collect({rank for name in names for rank in solvers[name]}, device)
        for name in names:
            watchers[name].share(inputs)


def watch_mixtures(block: Block, plans: Sequence[LayerPlan], shares: int) -> list[MixtureWatcher]:
    """A watcher for each mixture of experts of the block that has a planned layer, for so many shares of samples."""
    planned = {plan.layer.name: plan for plan in plans}
    watchers = []
    for mixture in BlockExperts(block.module).mixtures:
        names = [f"{block.name}.{name}" for name in mixture.matrices]
        own_plans = [planned[name] for name in names if name in planned]
        if own_plans:
            watchers.append(MixtureWatcher(block.name, mixture, own_plans, shares))
    return watchers
