"""Watch one mixture of experts while calibration batches pass through, and fold what each expert's layers see."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from dashq.calibration.expert_lists import ListWatch
from dashq.calibration.gates import (
    CHECK_TOLERANCE,
    CHECKED_TOKENS,
    Routing,
    dispatched,
    indexed,
    not_understood,
    router_logits,
)
from dashq.calibration.layers import Observation, require_finite
from dashq.data import Curvature, Diagonal, Full
from dashq.errors import PluginError
from dashq.model.mixtures import ListedMixture, Mixture, StackedMixture
from dashq.recipe.plan import LayerPlan
from dashq.strategies import Router

# The pooled estimate of a layer lets every expert see so many tokens, the first ones: windows are drawn at random.
POOLED_TOKENS = 2048
# Estimators make a new small state after each call. Where the C library's heap puts it into the gap that the inputs
# before left, the next do not fit: with all tokens at once it grew by one expert's inputs for each expert.
TOKENS_AT_A_TIME = 512


class Fold:
    """The state of one layer's estimator, how many tokens counted, and how many they are worth."""

    def __init__(self, plan: LayerPlan) -> None:
        self.plan, self.estimator = plan, plan.scheme.estimator
        self.state = self.estimator.start(plan.layer)
        self.tokens, self._sum, self._squares = 0, 0.0, 0.0

    def see(self, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]) -> None:
        """Fold inputs in, each with its weight."""
        self.state = self.estimator.update(self.state, x.float(), token_weight)
        self._sum += float(token_weight.sum())
        self._squares += float(token_weight.square().sum())

    @property
    def effective_tokens(self) -> float:
        """(Σw)² / Σw²: the number of equal tokens that would tell as much (Kish)."""
        return self._sum**2 / self._squares if self._squares else 0.0


class MixtureWatcher:
    """Folds what the planned layers of one mixture see into their estimators, expert by expert."""

    def __init__(self, block: str, mixture: Mixture, plans: Sequence[LayerPlan]) -> None:
        self.mixture, self._block = mixture, block
        self.name = f"{block}.{mixture.name}"
        self._folds = {plan.layer.name: Fold(plan) for plan in plans}
        self._routers: dict[str, Router] = {}
        self._router_of: dict[str, str] = {}  # overrides may give the layers of one mixture different routers
        for plan in plans:
            assert plan.scheme.router is not None  # plans refuse an expert without one
            key = self._router_of[plan.layer.name] = plan.scheme.router.model_dump_json()
            self._routers[key] = plan.scheme.router
        self._pooled: dict[str, Any] = {}
        self._pooled_tokens = 0

    def see(self, routing: Routing) -> None:
        """Fold one batch: each expert's layers get the tokens that count for it, as the router says."""
        chosen = routing.chosen.sum(0).tolist()
        for fold in self._folds.values():
            fold.tokens += chosen[fold.plan.layer.expert or 0]
        for key, router in self._routers.items():
            weights = self._token_weights(router, routing)
            for expert in range(self.mixture.count):
                for tokens in _in_parts(weights[:, expert].nonzero().flatten()):
                    for name, x in self._inputs(expert, routing.given(expert, tokens)):
                        if self._router_of.get(name) == key:
                            self._folds[name].see(x, weights[tokens, expert])
        self._pool(routing)

    def observations(self) -> Iterator[tuple[str, Observation]]:
        """What was learned about each layer, shrunk towards the pooled estimate where tokens are few."""
        finished: dict[int, Curvature] = {}
        for name, fold in self._folds.items():
            state = self._pooled[name]
            if id(state) not in finished:
                finished[id(state)] = fold.estimator.finish(state)
            pooled = finished[id(state)]
            effective, pooling = fold.effective_tokens, fold.plan.scheme.pooling_tokens
            share = pooling / (pooling + effective) if effective else 1.0
            own = fold.estimator.finish(fold.state) if effective else pooled
            curvature = shrink(own, pooled, share) if 0 < share < 1 else own
            yield name, Observation(require_finite(name, curvature), fold.tokens, effective, share)

    def _inputs(self, expert: int, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        return ((f"{self._block}.{name}", inputs) for name, inputs in self.mixture.layer_inputs(expert, x))

    def _pool(self, routing: Routing) -> None:
        """Let every expert see the first tokens of all, as if they had all been sent to it."""
        count = min(len(routing.hidden), POOLED_TOKENS - self._pooled_tokens)
        self._pooled_tokens += count
        for tokens in _in_parts(torch.arange(count, device=routing.hidden.device)):
            ones = torch.ones(len(tokens), device=tokens.device)
            shared: dict[str, Any] = {}  # what all experts are given alike is folded once for all of them
            for expert in range(self.mixture.count):
                x = routing.given(expert, tokens)
                for name, inputs in self._inputs(expert, x):
                    if name not in self._folds:
                        continue
                    fold = self._folds[name]
                    key = fold.estimator.model_dump_json() if inputs is x and not routing.scaled else name
                    if key not in shared:
                        before = self._pooled[name] if name in self._pooled else fold.estimator.start(fold.plan.layer)
                        shared[key] = fold.estimator.update(before, inputs.float(), ones)
                    self._pooled[name] = shared[key]

    def _token_weights(self, router: Router, routing: Routing) -> Float[Tensor, "tokens experts"]:
        """The router's answer, refused where it cannot be weights of tokens."""
        weights = router.token_weights(routing.probabilities, routing.chosen)
        expected = tuple(routing.probabilities.shape)
        wrong = ""
        if not isinstance(weights, Tensor) or tuple(weights.shape) != expected:
            found = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            wrong = f"gives {found} where [tokens, experts] is {list(expected)}"
        elif not weights.isfinite().all():
            wrong = "gives token weights that are NaN or infinite"
        elif bool((weights < 0).any()):
            wrong = f"gives negative token weights, down to {float(weights.min()):g}"
        if wrong:
            raise PluginError(f"{self.name}: the router {router.name!r} {wrong}")
        return weights.float()


def _in_parts(tokens: Int64[Tensor, " tokens"]) -> Sequence[Int64[Tensor, " part"]]:
    return tokens.split(TOKENS_AT_A_TIME) if len(tokens) else ()


def shrink(own: Curvature, pooled: Curvature, share: float) -> Curvature:
    """(1 - share) · own + share · pooled, for every kind of curvature that is a linear function of second moments."""
    if isinstance(own, Diagonal) and isinstance(pooled, Diagonal):
        return replace(own, values=torch.lerp(own.values, pooled.values, share))
    if isinstance(own, Full) and isinstance(pooled, Full):
        return replace(own, matrix=torch.lerp(own.matrix, pooled.matrix, share))
    raise PluginError(
        f"{type(own).__name__} curvature cannot be shrunk towards that of its layer; "
        "use `pooling_tokens: 0` in the scheme"
    )


@contextmanager
def watching_experts(watcher: MixtureWatcher) -> Generator[None]:
    """Show a watcher every batch that passes through its mixture, for the duration of the `with` statement."""
    mixture = watcher.mixture
    noted: list[tuple[Tensor, Tensor]] = []  # the router's input and logits

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        noted[:] = [router_logits(watcher.name, mixture, inputs[0], output)]

    handles = [mixture.router.register_forward_hook(note)]
    if isinstance(mixture, ListedMixture):
        handles += ListWatch(watcher.name, mixture, noted, watcher.see).attach()
    elif isinstance(mixture, StackedMixture):
        handles += _watch_stack(watcher, mixture, noted)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch_stack(watcher: MixtureWatcher, mixture: StackedMixture, noted: list[tuple[Tensor, Tensor]]) -> list[Any]:
    checked = False

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        nonlocal checked
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        states, logits = noted[0]
        if len(inputs) == 1:
            routing, weights = dispatched(mixture, inputs[0], states, logits)
        else:
            routing, weights = indexed(inputs, logits)
        if not checked:
            _check_understood(watcher.name, mixture, routing, weights, output)
            checked = True
        watcher.see(routing)

    return [mixture.experts.register_forward_hook(see, with_kwargs=True)]


def _check_understood(
    name: str, mixture: StackedMixture, routing: Routing, weights: Float[Tensor, "tokens experts"], output: Tensor
) -> None:
    """Compare what the model's experts make of the first tokens with what our view of them makes."""
    count = min(CHECKED_TOKENS, len(routing.hidden))
    expected = torch.zeros(count, output.shape[-1], device=output.device)
    for expert in range(mixture.count):
        tokens = routing.chosen[:count, expert].nonzero().flatten()
        if len(tokens):
            made = mixture.output(expert, routing.given(expert, tokens)).float()
            expected[tokens] += made * weights[tokens, expert, None]
    found = output.reshape(-1, len(routing.hidden), output.shape[-1]).float().sum(0)[:count]
    if float((found - expected).norm()) > CHECK_TOLERANCE * float(expected.norm()) + 1e-6:
        raise not_understood(name, mixture)
