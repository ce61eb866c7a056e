"""Observe one block: every planned layer's inputs go through its estimator while the batches pass."""

from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.calibration.experts import MixtureWatcher, watching_experts
from dashq.calibration.layers import Observation, SharedInputs, Watcher, watching
from dashq.calibration.sequential import OriginalBlock
from dashq.calibration.stream import Stream, stop_forward
from dashq.calibration.strips import solvers_of
from dashq.calibration.sums import PartSums
from dashq.errors import CheckpointError
from dashq.model.decoder import Block
from dashq.model.mixtures import BlockExperts
from dashq.processes.group import here
from dashq.recipe.plan import LayerPlan


class BlockWatcher:
    """Watches all planned layers of a block, dense ones and experts, while samples pass or in the place of that."""

    def __init__(
        self, block: Block, plans: Sequence[LayerPlan], shares: int, is_spread: bool, shared: bool = False
    ) -> None:
        """For so many shares of samples in all; they may be `is_spread` over several processes.

        The layers may be those of one stage, which have `shared` inputs.
        """
        self._block, self._is_spread = block, is_spread
        self._inputs: list[SharedInputs] = []
        self._solvers = solvers_of(plans, here().count, shared)
        dense = (plan for plan in plans if plan.layer.expert is None)
        self._watchers = {plan.layer.name: Watcher(plan.layer, plan.scheme.estimator, self._inputs) for plan in dense}
        self._mixtures = watch_mixtures(block, plans, shares)

    @contextmanager
    def watching(self, original: OriginalBlock | None, until: str) -> Generator[None]:
        """See every batch that passes the block, or the `original` one, as far as the layer `until`."""
        hooks = {name: watcher.see for name, watcher in self._watchers.items()}
        with ExitStack() as stack:
            stack.enter_context(watching(self._block.linears, hooks))
            for mixture in self._mixtures:
                stack.enter_context(watching_experts(mixture))
            if original:
                originals = {name: watcher.see_original for name, watcher in self._watchers.items()}
                stack.enter_context(watching(original.block.linears, originals))
            if until:
                # Attached last, so that the layer's own hooks have seen its inputs before the batch ends.
                stack.enter_context(watching(self._block.linears, {until: stop_forward}))
            if until and original:
                stack.enter_context(watching(original.block.linears, {until: stop_forward}))
            yield

    def end_share(self) -> None:
        """Every token of one share of the samples has been seen."""
        for shared in self._inputs:
            shared.fold.end_share()
        for mixture in self._mixtures:
            mixture.end_share()

    def collect(self, also: Collection[int] = ()) -> None:
        """Let every process that solves a layer know what all have seen of it, and some processes `also`."""
        if self._is_spread:
            knowing = {name: sorted({*ranks, *also}) for name, ranks in self._solvers.items()}
            with self._block.device:
                _collect(self._watchers, knowing, self._block.device)
                for mixture in self._mixtures:
                    mixture.collect(knowing, self._block.device)

    def sums(self) -> PartSums:
        """The sums of all folds, once every token has been seen."""
        with self._block.device:
            inputs = {name: watcher.inputs for name, watcher in self._watchers.items()}
            own = PartSums(
                folds={shared.layer.name: shared.sums for shared in dict.fromkeys(inputs.values())},
                inputs={name: shared.layer.name for name, shared in inputs.items()},
            )
            return PartSums.together([own, *(mixture.sums() for mixture in self._mixtures)])

    def take(self, sums: PartSums) -> None:
        """Observe what an earlier run has seen of these layers."""
        for name, watcher in self._watchers.items():
            inputs = self._watchers[sums.inputs[name]].inputs
            inputs.take(sums.folds[inputs.layer.name])
            watcher.share(inputs)
        for mixture in self._mixtures:
            mixture.take(sums)

    def observations(self) -> dict[str, Observation]:
        """The observation of each layer, by name; among several processes, of those that this one solves a strip of."""
        own = [name for name, ranks in self._solvers.items() if not self._is_spread or here().rank in ranks]
        with self._block.device:  # where estimators start for a layer that the block never called
            observations = {name: self._watchers[name].observation() for name in self._watchers if name in own}
        for mixture in self._mixtures:
            observations |= mixture.observations([name for name in mixture.names if name in own])
        return observations


def observe_block(
    block: Block,
    plans: Sequence[LayerPlan],
    stream: Stream,
    one_pass: bool,
    original: OriginalBlock | None = None,
    until: str = "",
    end_share: Callable[[], None] = lambda: None,
) -> dict[str, Observation]:
    """The observation of each planned layer of the block, by name; see `watch_block`."""
    watcher = watch_block(block, plans, stream, one_pass, original, until, end_share)
    watcher.collect()
    return watcher.observations()


def watch_block(
    block: Block,
    plans: Sequence[LayerPlan],
    stream: Stream,
    one_pass: bool,
    original: OriginalBlock | None = None,
    until: str = "",
    end_share: Callable[[], None] = lambda: None,
) -> BlockWatcher:
    """The watcher of the block's planned layers, once every sample of this process has passed.

    With `one_pass` the stream moves on to the next block as it goes. Otherwise each batch goes through the `original`
    block first, so that layers can compare, and through this one as far as the layer `until`. `end_share` is called
    behind each share of the samples.
    """
    watcher = BlockWatcher(block, plans, stream.share_count, stream.is_spread, shared=bool(until))
    first = (original.stream, original.block) if original else None
    with watcher.watching(original, until):
        for share in stream.shares:
            if one_pass:
                stream.advance(block, share)
            else:
                stream.observe(block, first, share)
            watcher.end_share()
            end_share()
    return watcher


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
    solvers = solvers_of(plans, here().count, shared=True)
    names = {each: [plan.layer.name for plan in plans if plan.scheme.estimator == each.estimator] for each in shared}
    if stream.is_spread:
        for each in shared:
            each.collect({rank for name in names[each] for rank in solvers[name]}, stream.device)
    return {
        name: each.observation
        for each in shared
        for name in names[each]
        if not stream.is_spread or here().rank in solvers[name]
    }


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
