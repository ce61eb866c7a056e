"""Watch a mixture whose experts are modules in a list: who is given what, and by how much the model lets each count."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from dashq.calibration.gates import (
    CHECK_TOLERANCE,
    CHECKED_TOKENS,
    Gate,
    Routing,
    find_gate,
    not_understood,
    row_keys,
)
from dashq.errors import CheckpointError
from dashq.model.mixtures import ListedMixture

FITTED_TOKENS = 256  # at a time, where the weights of all tokens are wanted


class ListWatch:
    """Tells `see` of every batch that passes through the mixture; `noted` holds its router's input and scores.

    The weights that the model gives to its experts are no one's input or output. They are found by least squares: the
    mixture's output is the sum, with these weights, of what its experts and other modules, such as shared experts,
    make of a token. What is left over shows whether that is so, and the weights show which gate the scores go through.
    """

    def __init__(
        self,
        name: str,
        mixture: ListedMixture,
        noted: list[tuple[Tensor, Tensor]],
        see: Callable[[Routing], None],
    ) -> None:
        self._name, self._mixture, self._noted, self._tell = name, mixture, noted, see
        self._given: dict[int, list[Tensor]] = defaultdict(list)
        self._others: dict[str, Tensor] = {}
        self._gate: Gate | None = None
        self._first, self._watching = True, True

    def attach(self) -> list[Any]:
        """The handles of all hooks."""
        mixture = self._mixture
        handles: list[Any] = [mixture.parent.register_forward_hook(self._see)]
        for index, expert in enumerate(mixture.modules.values()):
            handles.append(expert.register_forward_pre_hook(partial(self._note_expert, index)))
        for name, child in mixture.parent.named_children():
            if child is not mixture.experts and child is not mixture.router:
                handles.append(child.register_forward_hook(partial(self._note_other, name)))
        return handles

    def _note_expert(self, expert: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._watching:
            self._given[expert].append(row_keys(inputs[0].flatten(0, -2)))

    def _note_other(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self._others[name] = output

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        states, scores = self._noted[0]
        chosen = self._chosen(states)
        self._watching = False
        outputs = output if isinstance(output, tuple | list) else (output,)
        made = next((value for value in outputs if isinstance(value, Tensor) and value.numel() == states.numel()), None)
        if made is None:
            raise not_understood(self._name, self._mixture)
        fit = partial(self._weights, states, chosen, made.reshape(states.shape))
        if self._first:
            tokens = torch.arange(min(CHECKED_TOKENS, len(states)))
            self._gate = find_gate(scores[tokens], fit(tokens), chosen[tokens])
            self._first = False
        if self._gate:
            probabilities = self._gate(scores)
        else:
            probabilities = torch.cat([fit(tokens) for tokens in torch.arange(len(states)).split(FITTED_TOKENS)])
        self._tell(Routing(states, probabilities, chosen))
        self._given.clear()
        self._others.clear()
        self._watching = True

    def _chosen(self, states: Float[Tensor, "tokens columns"]) -> Bool[Tensor, "tokens experts"]:
        keys = row_keys(states)
        chosen = torch.zeros(len(states), self._mixture.count, dtype=torch.bool, device=states.device)
        for expert, batches in self._given.items():
            seen = torch.cat(batches)
            if not torch.isin(seen, keys).all():
                raise CheckpointError(f"{self._name}: expert {expert} is given what its router was not: not supported")
            chosen[:, expert] = torch.isin(keys, seen)
        return chosen

    def _weights(
        self,
        states: Float[Tensor, "tokens columns"],
        chosen: Bool[Tensor, "tokens experts"],
        output: Float[Tensor, "tokens columns"],
        tokens: Int64[Tensor, " some"],
    ) -> Float[Tensor, "some experts"]:
        """By which weights some tokens' outputs are sums of what their experts make of them."""
        x, mine, made = states[tokens], chosen[tokens], output[tokens].double()
        terms: list[list[Tensor]] = [[] for _ in tokens]
        for expert in range(self._mixture.count):
            rows = mine[:, expert].nonzero().flatten()
            if len(rows):
                for row, term in zip(rows.tolist(), self._mixture.output(expert, x[rows]), strict=True):
                    terms[row].append(term)
        for other in self._others.values():
            if other.numel() == states.numel():
                for row, term in enumerate(other.reshape(states.shape)[tokens]):
                    terms[row].append(term)
        weights = torch.zeros(mine.shape, device=states.device)
        left = torch.zeros_like(made)
        for row, mixed in enumerate(terms):
            matrix = torch.stack([*mixed, torch.zeros_like(x[row])], dim=1).double()  # a token may have no expert
            solution = torch.linalg.pinv(matrix) @ made[row]
            weights[row, mine[row]] = solution[: int(mine[row].sum())].float()
            left[row] = made[row] - matrix @ solution
        if float(left.norm()) > CHECK_TOLERANCE * float(made.norm()) + 1e-6:
            raise not_understood(self._name, self._mixture)
        return weights
