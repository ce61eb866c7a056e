"""Watch a mixture whose experts are modules in a list: the tokens and the weight that the model gives to each."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dashq.calibration.gates import (
    CHECK_TOLERANCE,
    CHECKED_TOKENS,
    Gate,
    RouterCall,
    Routing,
    find_gate,
    other_computation,
    row_keys,
)
from dashq.errors import CheckpointError
from dashq.model.mixtures import ListedMixture

FITTED_TOKENS = 256  # at a time, where the weights of all tokens are wanted


class ListWatch:
    """Calls `see` with the routing of every batch that passes through the mixture; `latest` holds its router's call.

    The weights that the model gives to its experts are no module's input or output. Least squares finds them: the
    mixture's output is the sum, with these weights, of the outputs that its experts and other modules, such as shared
    experts, have for a token. A large residual shows that it is not, and the weights show which gate turns scores
    into probabilities.
    """

    def __init__(
        self, name: str, mixture: ListedMixture, latest: list[RouterCall], see: Callable[[Routing], None]
    ) -> None:
        self._name, self._mixture, self._latest, self._show = name, mixture, latest, see
        self._keys: dict[int, list[Tensor]] = defaultdict(list)  # of the rows that each expert was given
        self._others: dict[str, Tensor] = {}  # outputs of modules beside the experts
        self._gate: Gate | None = None
        self._first, self._watching = True, True

    def attach(self) -> list[RemovableHandle]:
        """The handles of all hooks."""
        mixture = self._mixture
        handles = [mixture.parent.register_forward_hook(self._see)]
        for index, expert in enumerate(mixture.modules.values()):
            handles.append(expert.register_forward_pre_hook(partial(self._note_expert, index)))
        for name, child in mixture.parent.named_children():
            if child is not mixture.experts and child is not mixture.router:
                handles.append(child.register_forward_hook(partial(self._note_other, name)))
        return handles

    def _note_expert(self, expert: int, module: nn.Module, inputs: tuple[Float[Tensor, "*batch columns"], ...]) -> None:
        if self._watching:
            self._keys[expert].append(row_keys(inputs[0].flatten(0, -2)))

    def _note_other(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self._others[name] = output

    def _see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A forward hook of the module that holds router and experts, called when the batch has passed them all."""
        hidden, scores = self._latest[0].hidden, self._latest[0].scores
        chosen = self._chosen(hidden)
        self._watching = False  # from here on the calls of experts are our own
        outputs = output if isinstance(output, tuple | list) else (output,)
        states = (value for value in outputs if isinstance(value, Tensor) and value.numel() == hidden.numel())
        mixed = next(states, None)
        if mixed is None:
            raise other_computation(self._name, self._mixture)
        fit = partial(self._weights, hidden, chosen, mixed.reshape(hidden.shape))
        if self._first:
            tokens = torch.arange(min(CHECKED_TOKENS, len(hidden)))
            self._gate = find_gate(scores[tokens], fit(tokens), chosen[tokens])
            self._first = False
        if self._gate:
            probabilities = self._gate(scores)
        else:
            probabilities = torch.cat([fit(tokens) for tokens in torch.arange(len(hidden)).split(FITTED_TOKENS)])
        self._show(Routing(hidden, probabilities, chosen))
        self._keys.clear()
        self._others.clear()
        self._watching = True

    def _chosen(self, hidden: Float[Tensor, "tokens columns"]) -> Bool[Tensor, "tokens experts"]:
        """The experts that were given each token: rows are recognized, since experts are given them without indices."""
        keys = row_keys(hidden)
        chosen = torch.zeros(len(hidden), self._mixture.count, dtype=torch.bool, device=hidden.device)
        for expert, batches in self._keys.items():
            expert_keys = torch.cat(batches)
            if not torch.isin(expert_keys, keys).all():
                raise CheckpointError(f"{self._name}: expert {expert} is given what its router was not: not supported")
            chosen[:, expert] = torch.isin(keys, expert_keys)
        return chosen

    def _weights(
        self,
        hidden: Float[Tensor, "tokens columns"],
        chosen: Bool[Tensor, "tokens experts"],
        output: Float[Tensor, "tokens columns"],
        tokens: Int64[Tensor, " part"],
    ) -> Float[Tensor, "part experts"]:
        """Recovers each chosen expert's weight by least squares: output ≈ Σ weight · expert(x) + Σ weight · other.

        Raises `CheckpointError` if the residual of these tokens together is large.
        """
        x, part_chosen, targets = hidden[tokens], chosen[tokens], output[tokens].double()
        # For each token its equation's columns: the outputs of its experts in order, then those of other modules.
        # Experts are called once for all their tokens.
        terms: list[list[Tensor]] = [[] for _ in tokens]
        for expert in range(self._mixture.count):
            rows = part_chosen[:, expert].nonzero().flatten()
            if len(rows):
                for row, term in zip(rows.tolist(), self._mixture.output(expert, x[rows]), strict=True):
                    terms[row].append(term)
        for other in self._others.values():
            if other.numel() == hidden.numel():
                for row, term in enumerate(other.reshape(hidden.shape)[tokens]):
                    terms[row].append(term)
        weights = torch.zeros(part_chosen.shape, device=hidden.device)
        residual = torch.zeros_like(targets)
        for row, columns in enumerate(terms):
            # The column of zeros is for tokens without any expert. The pseudoinverse gives it no weight, and the
            # solution of least norm where outputs depend on one another.
            matrix = torch.stack([*columns, torch.zeros_like(x[row])], dim=1).double()
            solution = torch.linalg.pinv(matrix) @ targets[row]
            weights[row, part_chosen[row]] = solution[: int(part_chosen[row].sum())].float()
            residual[row] = targets[row] - matrix @ solution
        if float(residual.norm()) > CHECK_TOLERANCE * float(targets.norm()) + 1e-6:
            raise other_computation(self._name, self._mixture)
        return weights
