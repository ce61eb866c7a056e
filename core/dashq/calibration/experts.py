"""Watch one mixture of experts while calibration batches pass through, and fold what each expert's layers see."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dashq.calibration.expert_lists import ListWatch
from dashq.calibration.folds import Fold, FoldSums
from dashq.calibration.gates import (
    CHECK_TOLERANCE,
    CHECKED_TOKENS,
    RouterCall,
    Routing,
    dispatched,
    indexed,
    other_computation,
    router_call,
)
from dashq.calibration.layers import Observation, require_finite
from dashq.calibration.sums import PartSums
from dashq.curvature import Curvature
from dashq.errors import PluginError
from dashq.model.mixtures import ListedMixture, Mixture, StackedMixture
from dashq.processes.group import here
from dashq.recipe.plan import LayerPlan
from dashq.strategies import Router

# Tokens of a layer's pooled estimate: every expert sees the first ones of each share of the samples, as many of each,
# which are random since windows are drawn so.
POOLED_TOKENS = 2048
# Estimators allocate a new small state in each call. Where the C library's heap puts it into the gap that the last
# inputs left, the next do not fit there: with all tokens at once the heap grew by one expert's inputs for each expert.
TOKENS_AT_A_TIME = 512


class MixtureWatcher:
    """Folds what the planned layers of one mixture see into their estimators, expert by expert.

    Each layer has a fold of its own, of the tokens that its router counts for its expert, and a pooled one, of the
    first tokens of each share of the samples, as if every expert had been given them all.
    """

    def __init__(self, block: str, mixture: Mixture, plans: Sequence[LayerPlan], shares: int = 1) -> None:
        self.mixture, self._block = mixture, block
        self.name = f"{block}.{mixture.name}"
        self._plans = {plan.layer.name: plan for plan in plans}
        self._folds = {name: Fold(plan.layer, plan.scheme.estimator) for name, plan in self._plans.items()}
        self._routers: dict[str, Router] = {}
        self._router_of: dict[str, str] = {}  # overrides may give the layers of one mixture different routers
        for name, plan in self._plans.items():
            assert plan.scheme.router is not None  # plans refuse an expert without one
            key = self._router_of[name] = plan.scheme.router.model_dump_json()
            self._routers[key] = plan.scheme.router
        self._chosen = [0] * mixture.count  # tokens that the model sent to each expert
        self._collected: dict[Fold, FoldSums] = {}
        self._pooled: dict[str, Fold] = {}
        self._pooled_by_key: dict[str, Fold] = {}
        self._pooled_tokens, self._most_pooled = 0, POOLED_TOKENS // shares  # of the share that is seen now

    @property
    def names(self) -> Iterable[str]:
        """The names of the planned layers."""
        return self._plans

    def see(self, routing: Routing) -> None:
        """Fold one batch: each expert's layers get the tokens that count for it, as the router says."""
        for expert, tokens in enumerate(routing.chosen.sum(0).tolist()):
            self._chosen[expert] += tokens
        for key, router in self._routers.items():
            weights = self._token_weights(router, routing)
            for expert in range(self.mixture.count):
                for part in _in_parts(weights[:, expert].nonzero().flatten()):
                    for name, x in self._inputs(expert, routing.expert_input(expert, part)):
                        if self._router_of.get(name) == key:
                            self._folds[name].see(x, weights[part, expert])
        self._pool(routing)

    def end_share(self) -> None:
        """Every token of one share of the samples has been seen."""
        self._pooled_tokens = 0
        for fold in (*self._folds.values(), *dict.fromkeys(self._pooled.values())):
            fold.end_share()

    def collect(self, solvers: Mapping[str, Sequence[int]], device: torch.device) -> None:
        """Let every process that solves a layer know what all processes have seen of its inputs."""
        self._chosen = here().total(self._chosen)
        ranks: dict[Fold, set[int]] = {fold: set(solvers[name]) for name, fold in self._folds.items()}
        for name, fold in self._pooled.items():
            ranks.setdefault(fold, set()).update(solvers[name])
        for fold, own_ranks in ranks.items():
            if sums := fold.collected(own_ranks, device):
                self._collected[fold] = sums

    def sums(self) -> PartSums:
        """The sums of all folds, once every token has been seen."""
        return PartSums(
            folds={name: self._sums(fold) for name, fold in self._folds.items()},
            pooled_folds={fold.layer.name: self._sums(fold) for fold in self._pooled_by_key.values()},
            pooled={name: fold.layer.name for name, fold in self._pooled.items()},
            chosen={self.name: self._chosen},
        )

    def take(self, sums: PartSums) -> None:
        """Observe what an earlier run has seen, in the place of any token."""
        self._chosen = list(sums.chosen[self.name])
        for name, fold in self._folds.items():
            self._collected[fold] = sums.folds[name]
            first = sums.pooled[name]
            if first not in self._pooled_by_key:
                self._pooled_by_key[first] = Fold(self._folds[first].layer, self._folds[first].estimator)
                self._collected[self._pooled_by_key[first]] = sums.pooled_folds[first]
            self._pooled[name] = self._pooled_by_key[first]

    def observations(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Observation]]:
        """The curvature of each layer, or of some, shrunk towards the pooled one where tokens are few."""
        pooled_curvatures: dict[Fold, Curvature] = {}
        for name in self._plans if names is None else names:
            plan, fold, pooled_fold = self._plans[name], self._folds[name], self._pooled[name]
            if pooled_fold not in pooled_curvatures:
                pooled_curvatures[pooled_fold] = self._curvature(pooled_fold)
            pooled = pooled_curvatures[pooled_fold]
            effective, pooling = self._sums(fold).effective_tokens, plan.scheme.pooling_tokens
            # As if the pooled estimate were worth `pooling` tokens; without any of its own it is all there is.
            share = pooling / (pooling + effective) if effective else 1.0
            own = self._curvature(fold) if effective else pooled
            curvature = own.blended(pooled, share) if 0 < share < 1 else own
            _require_needed(name, curvature, plan)
            tokens = self._chosen[plan.layer.expert or 0]
            yield name, Observation(require_finite(name, curvature), tokens, effective, share)

    def _sums(self, fold: Fold) -> FoldSums:
        """The sums over all that all processes have seen, where they were collected."""
        return self._collected[fold] if fold in self._collected else fold.sums()

    def _curvature(self, fold: Fold) -> Curvature:
        return fold.estimator.finish(self._sums(fold).state)

    def _inputs(
        self, expert: int, x: Float[Tensor, "tokens columns"]
    ) -> Iterator[tuple[str, Float[Tensor, "tokens inner"]]]:
        return ((f"{self._block}.{name}", inputs) for name, inputs in self.mixture.layer_inputs(expert, x))

    def _pool(self, routing: Routing) -> None:
        """Let every expert see the first tokens of a share, as if they had all been sent to it."""
        count = min(len(routing.hidden), self._most_pooled - self._pooled_tokens)
        self._pooled_tokens += count
        for part in _in_parts(torch.arange(count, device=routing.hidden.device)):
            ones = torch.ones(len(part), device=part.device)
            folded: set[Fold] = set()  # of these tokens
            for expert in range(self.mixture.count):
                x = routing.expert_input(expert, part)
                for name, inputs in self._inputs(expert, x):
                    if name in self._folds:
                        fold = self._pooled_fold(name, alike=inputs is x and not routing.scaled)
                        if fold not in folded:
                            fold.see(inputs, ones)
                            folded.add(fold)

    def _pooled_fold(self, name: str, alike: bool) -> Fold:
        """The pooled fold of a layer; layers that are given `alike` inputs, whatever the expert, share one."""
        if name not in self._pooled:
            own = self._folds[name]
            key = own.estimator.model_dump_json() if alike else name
            if key not in self._pooled_by_key:
                self._pooled_by_key[key] = Fold(own.layer, own.estimator)
            self._pooled[name] = self._pooled_by_key[key]
        return self._pooled[name]

    def _token_weights(self, router: Router, routing: Routing) -> Float[Tensor, "tokens experts"]:
        """The router's answer, refused where it cannot be weights of tokens."""
        weights = router.token_weights(routing.probabilities, routing.chosen)
        expected = tuple(routing.probabilities.shape)
        wrong = ""
        if not isinstance(weights, Tensor) or tuple(weights.shape) != expected:
            shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            wrong = f"gives {shape} where [tokens, experts] is {list(expected)}"
        elif not weights.isfinite().all():
            wrong = "gives token weights that are NaN or infinite"
        elif bool((weights < 0).any()):
            wrong = f"gives negative token weights, down to {float(weights.min()):g}"
        if wrong:
            raise PluginError(f"{self.name}: the router {router.name!r} {wrong}")
        return weights.float()


def _in_parts(tokens: Int64[Tensor, " tokens"]) -> Sequence[Int64[Tensor, " part"]]:
    """The tokens' indices, few at a time; no part where there are none."""
    return tokens.split(TOKENS_AT_A_TIME) if len(tokens) else ()


def _require_needed(name: str, curvature: Curvature, plan: LayerPlan) -> None:
    """Refuse a blend that has become less than the solver needs."""
    needs: type[Curvature] = plan.scheme.solver.needs
    if not isinstance(curvature, needs):
        raise PluginError(
            f"{name}: blended with the pooled estimate its curvature is {type(curvature).__name__}, "
            f"but solver {plan.scheme.solver.name!r} needs {needs.__name__}; "
            "override `blended` in the curvature, or use `pooling_tokens: 0` in the scheme"
        )


@contextmanager
def watching_experts(watcher: MixtureWatcher) -> Generator[None]:
    """Show a watcher every batch that passes through its mixture, for the duration of the `with` statement."""
    mixture = watcher.mixture
    latest: list[RouterCall] = []  # one at most

    def note(module: nn.Module, inputs: tuple[Float[Tensor, "..."], ...], output: Any) -> None:
        latest[:] = [router_call(watcher.name, mixture, inputs[0], output)]

    handles = [mixture.router.register_forward_hook(note)]
    if isinstance(mixture, ListedMixture):
        handles += ListWatch(watcher.name, mixture, latest, watcher.see).attach()
    elif isinstance(mixture, StackedMixture):
        handles.append(_watch_stack(watcher, mixture, latest))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_stack(watcher: MixtureWatcher, mixture: StackedMixture, latest: list[RouterCall]) -> RemovableHandle:
    """The handle of a hook that shows a watcher each batch; `latest` holds the call of its router that came before."""
    checked = False

    def see(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Float[Tensor, "*batch columns"]
    ) -> None:
        nonlocal checked
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(inputs) == 1:
            routing, weights = dispatched(mixture, inputs[0], latest[0])
        else:
            routing, weights = indexed(inputs, latest[0])
        if not checked:
            _check_understood(watcher.name, mixture, routing, weights, output)
            checked = True
        watcher.see(routing)

    return mixture.experts.register_forward_hook(see, with_kwargs=True)


def _check_understood(
    name: str,
    mixture: StackedMixture,
    routing: Routing,
    weights: Float[Tensor, "tokens experts"],
    output: Float[Tensor, "*batch columns"],
) -> None:
    """Compare the output of the model's experts for the first tokens with that of our view of them."""
    count = min(CHECKED_TOKENS, len(routing.hidden))
    expected = torch.zeros(count, output.shape[-1], device=output.device)
    for expert in range(mixture.count):
        tokens = routing.chosen[:count, expert].nonzero().flatten()
        if len(tokens):
            outputs = mixture.output(expert, routing.expert_input(expert, tokens)).float()
            expected[tokens] += outputs * weights[tokens, expert, None]
    # Experts that are given all tokens return [experts, tokens, columns], which the model adds up later.
    actual = output.reshape(-1, len(routing.hidden), output.shape[-1]).float().sum(0)[:count]
    if float((actual - expected).norm()) > CHECK_TOLERANCE * float(expected.norm()) + 1e-6:
        raise other_computation(name, mixture)
