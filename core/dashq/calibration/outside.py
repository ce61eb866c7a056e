"""Observe what lies outside the blocks: how often tokens are looked up, and what the head is given."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dashq.calibration.folds import Fold
from dashq.calibration.layers import Observation, Watcher, watching
from dashq.calibration.observe import is_solved_here
from dashq.calibration.shell import Shell
from dashq.calibration.stream import StopForward, Stream, stop_forward
from dashq.calibration.strips import solvers_of
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

    The shell has its head. Errors in a row of the embeddings count as often as its token occurs, and alike in all
    columns; the head's columns count by its inputs. The curvature of one matrix that is both is the head's, with a
    `TIED_SHARE` of that of embeddings, once they have the same trace. The `original` stream is for a head to compare
    its inputs with. Among several processes, the observations are those of the layers that this one has a part in
    solving; of the `tokens`, which are those of all, the stream has its own.
    """
    observations: dict[str, Observation] = {}
    solvers = solvers_of(plans, here().count)
    for plan in plans:
        layer, estimator = plan.layer, plan.scheme.estimator
        is_own = is_solved_here(solvers[layer.name], stream)
        if layer.role == "embeddings" and not is_own:
            continue
        occurrences = torch.bincount(tokens.flatten(), minlength=layer.rows).to(model.device)
        row_weights = occurrences.clamp_min(1).float()  # a token that did not occur may do so yet
        if layer.role == "embeddings":
            flat = _flat(plan, torch.ones((), device=model.device))
            observations[layer.name] = Observation(flat, tokens.numel(), row_weights=row_weights)
            continue
        # A tied matrix cannot make up for its inputs: tokens are looked up in it as well.
        watcher = Watcher(layer, estimator, [])
        _watch_head(model, shell, watcher, stream, original if layer.role == "head" else None)
        if stream.is_spread:
            watcher.inputs.collect(set(solvers[layer.name]), model.device)
        if not is_own:
            continue
        own = watcher.observation()
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
