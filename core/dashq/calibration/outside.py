"""Observe what lies outside the blocks: how often tokens are looked up, and what the head is given."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dashq.calibration.folds import Fold
from dashq.calibration.layers import Observation, Watcher, watching
from dashq.calibration.shell import Shell
from dashq.calibration.stream import StopForward, Stream, stop_forward
from dashq.calibration.strips import solvers_of
from dashq.calibration.sums import PartSums
from dashq.curvature import Curvature
from dashq.model.decoder import Model
from dashq.processes.group import here
from dashq.recipe.plan import LayerPlan

# Of a matrix that is embeddings and head, the share of the embeddings in its curvature. Errors in logits cost most: at
# 4 bits SmolLM2 diverges by 0.096 nats per token with a share of 1, by 0.028 with one half, and by 0.025 with 0.
TIED_SHARE = 0.1


def observe_outside(
    model: Model,
    shell: Shell,
    plans: Sequence[LayerPlan],
    tokens: Int64[Tensor, "samples tokens"],
    stream: Stream,
    original: Stream | None = None,
) -> dict[str, Observation]:
    """The observation of embeddings and head, by name, once the `stream` of these tokens has passed every block.

    Of the `tokens`, which are those of all processes, the stream has its own; see `HeadWatcher`.
    """
    head = HeadWatcher(plans, model.device, stream.is_spread)
    head.watch(model, shell, stream, original)
    head.collect()
    return head.observations(tokens)


class HeadWatcher:
    """Watches what the head is given, or the one matrix that is embeddings and head, where it is planned.

    Errors in a row of the embeddings count as often as its token occurs, and alike in all columns; the head's columns
    count by its inputs. The curvature of one matrix that is both is the head's, with a `TIED_SHARE` of that of
    embeddings, once they have the same trace.
    """

    def __init__(self, plans: Sequence[LayerPlan], device: torch.device, is_spread: bool) -> None:
        """Of the `plans` for embeddings and head; samples may be `is_spread` over several processes."""
        self._plans, self._device, self._is_spread = plans, device, is_spread
        self._solvers = solvers_of(plans, here().count)
        self._watchers = {
            plan.layer.name: Watcher(plan.layer, plan.scheme.estimator, [])
            for plan in plans
            if not plan.layer.is_looked_up
        }

    def watch(self, model: Model, shell: Shell, stream: Stream, original: Stream | None = None) -> None:
        """See every sample once the `stream` has passed every block; the shell has its head.

        The `original` stream is for a head to compare its inputs with: a tied matrix cannot make up for them, since
        tokens are looked up in it as well.
        """
        for plan in self._plans:
            if watcher := self._watchers.get(plan.layer.name):
                _watch_head(model, shell, watcher, stream, original if plan.layer.role == "head" else None)

    def collect(self, also: Collection[int] = ()) -> None:
        """Let every process that solves a layer know what all have seen of it, and some processes `also`."""
        for name, watcher in self._watchers.items() if self._is_spread else ():
            watcher.inputs.collect({*self._solvers[name], *also}, self._device)

    def sums(self) -> PartSums:
        """The sums of all folds, once every token has been seen."""
        folds = {name: watcher.inputs.sums for name, watcher in self._watchers.items()}
        return PartSums(folds, inputs={name: name for name in folds})

    def take(self, sums: PartSums) -> None:
        """Observe what an earlier run has seen, in the place of any token."""
        for name, watcher in self._watchers.items():
            watcher.inputs.take(sums.folds[name])

    def observations(self, tokens: Int64[Tensor, "samples tokens"]) -> dict[str, Observation]:
        """The observation of each layer, by name; among several processes, of those that this one solves a strip of.

        `tokens` are those of all samples.
        """
        observations: dict[str, Observation] = {}
        for plan in self._plans:
            layer = plan.layer
            if self._is_spread and here().rank not in self._solvers[layer.name]:
                continue
            occurrences = torch.bincount(tokens.flatten(), minlength=layer.rows).to(self._device)
            row_weights = occurrences.clamp_min(1).float()  # a token that did not occur may do so yet
            if layer.is_looked_up:
                flat = _flat(plan, torch.ones((), device=self._device))
                observations[layer.name] = Observation(flat, tokens.numel(), row_weights=row_weights)
                continue
            own = self._watchers[layer.name].observation()
            if layer.role == "tied":
                flat = _flat(plan, own.curvature.diagonal().mean())
                own = replace(own, curvature=own.curvature.blended(flat, TIED_SHARE), row_weights=row_weights)
            observations[layer.name] = own
        return observations


def _watch_head(
    model: Model,
    shell: Shell,
    watcher: Watcher,
    stream: Stream,
    original: Stream | None,
) -> None:
    """Let the watcher see what the head is given for each batch, first by the original model where there is one."""
    output = model.network.get_output_embeddings()
    assert output is not None
    head = {"head": output}
    tokens = stream.tokens.split([len(hidden) for hidden in stream.batches])
    for share in stream.shares:
        for batch in share:
            passes = [(watcher.see_original, original.batches[batch])] if original else []
            for see, states in [*passes, (watcher.see, stream.batches[batch])]:
                with watching(head, {"head": see}), watching(head, {"head": stop_forward}), suppress(StopForward):
                    shell.predict(tokens[batch], states.to(model.device))
        watcher.inputs.fold.end_share()


def _flat(plan: LayerPlan, importance: Float[Tensor, ""]) -> Curvature:
    """The curvature of inputs that are alike in all columns: the estimator's own, from each unit vector once."""
    columns = plan.layer.columns
    fold = Fold(plan.layer, plan.scheme.estimator)
    units = (importance * columns).sqrt() * torch.eye(columns, device=importance.device)
    fold.see(units, torch.ones(columns, device=importance.device))
    return plan.scheme.estimator.finish(fold.sums().state)
