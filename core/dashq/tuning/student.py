"""The quantized model while it is tuned: packed codes, tunable values, and passes that hold one block at a time."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.func import functional_call

from dashq.calibration.shell import Call, Shell
from dashq.data import Quantized, StoredLayer, Tunable
from dashq.device import give_back_memory
from dashq.errors import CheckpointError
from dashq.model.decoder import Model, block_matrices
from dashq.model.mixtures import Matrix
from dashq.results.report import LayerReport, digest
from dashq.strategies import Serializer
from dashq.tuning.planned import norm_gains
from dashq.tuning.values import LayerValues, NormGain, values_of

States = Float[Tensor, "*copies samples tokens width"]


@dataclass(frozen=True, eq=False)
class BlockPass:
    """A pass through one block that can be gone back: its input, its output, and its parameters that learn by name."""

    input: States
    output: States
    leaves: Mapping[str, Float[Tensor, "..."]]
    layers: Mapping[str, Quantized]  # those of the block


@dataclass(frozen=True, eq=False)
class Pass:
    """A forward pass: how the tokens are given to each block, each block's input, and the last block's output.

    `kept` are the passes of the blocks where they stay in memory; elsewhere a block runs again on the way back.
    """

    calls: Sequence[Call]
    inputs: Sequence[States]
    states: States
    kept: Sequence[BlockPass] = ()


class Student:
    """A quantized model whose `tensors`, named as in its file, are read and unpacked whenever a block needs them.

    One that `learns` has tunables. Embeddings and head stay unpacked in memory, and as they are. One that `keeps_all`
    holds the weights of all blocks, unpacked, and all that a pass back needs, for the same results sooner.
    """

    def __init__(
        self,
        model: Model,
        serializer: Serializer,
        layers: Iterable[StoredLayer],
        tensors: Mapping[str, Any],
        learns: bool = True,
        keeps_all: bool = False,
    ) -> None:
        self._model, self._serializer, self._tensors, self._keeps_all = model, serializer, tensors, keeps_all
        self._layers = {layer.layer.name: layer for layer in layers}
        self._matrices = [self._matrices_of(block) for block in model.blocks]
        self._rooms: dict[tuple[int, str, torch.Size], Tensor] = {}  # for weights, by parameter in a block and shape
        self._unpacked: dict[str, Quantized] = {}
        inside = [name for name, layer in self._layers.items() if layer.layer.role == "linear"]
        self.values: dict[str, LayerValues] = (
            {name: values_of(name, self.quantized(name)) for name in inside} if learns else {}
        )
        self.norms = {name: NormGain(name, self._tensor(name)) for name in norm_gains(model) if name in tensors}
        blocks = tuple(f"{block}." for block in model.blocks)
        self._outer_norms = [name for name in self.norms if not name.startswith(blocks)]
        self._outer_weights = {
            f"{name}.weight": self.quantized(name).dequantize(model.dtype)
            for name, layer in self._layers.items()
            if layer.layer.role != "linear"
        }

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        return self._model.device

    @property
    def tunables(self) -> list[Tunable]:
        """All changes that can be made, in the order of the model's layers."""
        own = [tunable for values in self.values.values() for tunable in values.tunables]
        return [*own, *(norm.tunable for norm in self.norms.values())]

    @property
    def outside(self) -> dict[str, Float[Tensor, "..."]]:
        """The parameters outside the blocks that the shell is to compute with: gains of norms, embeddings and head."""
        gains = {name: self.norms[name].value().to(self._model.dtype) for name in self._outer_norms}
        return {**gains, **self._outer_weights}

    def quantized(self, name: str) -> Quantized:
        """One layer as its tensors hold it."""
        if name in self._unpacked:
            return self._unpacked[name]
        layer = self._layers[name]
        packed = {key: self._tensor(f"{name}.{key}") for key in self._serializer.pack(layer.empty())}
        quantized = self._serializer.unpack(packed, layer.layer.columns, layer.size, layer.grid)
        if self._keeps_all and layer.layer.role == "linear":  # others are unpacked once
            self._unpacked[name] = quantized
        return quantized

    @torch.no_grad()
    def applied(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], layers: Iterable[LayerReport]
    ) -> tuple[Mapping[str, Tensor], list[LayerReport]]:
        """Some of the model's tensors with the changed values in them, and the reports of the layers among them."""
        changed = {**tensors, **{name: norm.applied().cpu() for name, norm in self.norms.items() if name in tensors}}
        reports = []
        for layer in layers:
            if layer.name not in self.values:
                reports.append(layer)
                continue
            quantized = self.values[layer.name].applied(self.quantized(layer.name))
            packed = self._serializer.pack(quantized)
            changed |= {f"{layer.name}.{key}": tensor.cpu() for key, tensor in packed.items()}
            reports.append(replace(layer, digest=digest(quantized)))
        return changed, reports

    @torch.no_grad()
    def states(self, shell: Shell, samples: Sequence[Int[Tensor, "1 tokens"]]) -> list[States]:
        """The last block's output for each sample by itself; a block's weights are unpacked once for all of them."""
        give_back_memory()
        embedded = [shell.embed(tokens, self.outside) for tokens in samples]
        hidden, calls = [own for own, _ in embedded], [own for _, own in embedded]
        for index in range(len(self._model.blocks)):
            weights = self._weights(index)
            hidden = [self._run(index, own[index], states, weights) for own, states in zip(calls, hidden, strict=True)]
        return hidden

    @torch.no_grad()
    def forward(self, shell: Shell, tokens: Int[Tensor, "samples tokens"]) -> Pass:
        """Send tokens through all blocks, in a pass that can be gone back."""
        give_back_memory()
        with torch.enable_grad():  # norms before the blocks learn as well
            hidden, calls = shell.embed(tokens, self.outside)
        inputs, kept = [], []
        for index in range(len(self._model.blocks)):
            inputs.append(hidden)
            if self._keeps_all:
                kept.append(self._pass_through(index, calls[index], hidden))
                hidden = kept[-1].output.detach()
            else:
                hidden = self._run(index, calls[index], hidden, self._weights(index))
        return Pass(calls, inputs, hidden, kept)

    def backward(self, forward: Pass, gradient: States) -> None:
        """Add to the gradients of all tunables what follows from that by the last block's output.

        Each block runs again, unless its pass was kept: in memory are its weights, their gradients, and what lies
        between its layers.
        """
        give_back_memory()
        for index in reversed(range(len(self._model.blocks))):
            gradient = self._back_through(index, forward, gradient)
        outside = [self.norms[name].tunable.parameter for name in self._outer_norms if self.norms[name].learns]
        if outside and forward.inputs[0].requires_grad:  # only these: the embedding is large, and so is its gradient
            torch.autograd.backward(forward.inputs[0], gradient, inputs=outside)

    def _pass_through(self, index: int, call: Call, hidden: States) -> BlockPass:
        """Run a block so that it can be gone back."""
        layers: dict[str, Quantized] = {}
        weights = self._weights(index, layers)
        block, matrices = self._model.blocks[index], self._matrices[index]
        learning = [matrices[name].parameter for name in layers if self.values[name].learns]
        norms = [name for name in weights if f"{block}.{name}" in self.norms and self.norms[f"{block}.{name}"].learns]
        own_input = hidden.detach().requires_grad_()
        with torch.enable_grad():
            leaves = {name: weights[name].requires_grad_() for name in dict.fromkeys([*learning, *norms])}
            output = self._run(index, call, own_input, weights)
        return BlockPass(own_input, output, leaves, layers)

    def _back_through(self, index: int, forward: Pass, gradient: States) -> States:
        """The gradient by a block's input."""
        kept = forward.kept[index] if forward.kept else None
        passed = kept or self._pass_through(index, forward.calls[index], forward.inputs[index])
        by_input, *gradients = torch.autograd.grad(
            passed.output, [passed.input, *passed.leaves.values()], gradient, allow_unused=True
        )
        # None: of an expert that none of these tokens was sent to
        by_name = {name: own for name, own in zip(passed.leaves, gradients, strict=True) if own is not None}
        for name, quantized in passed.layers.items():
            matrix = self._matrices[index][name]
            if self.values[name].learns and matrix.parameter in by_name:
                self.values[name].add_gradient(matrix.of(by_name[matrix.parameter]), quantized)
        for name, own in by_name.items():
            norm = self.norms.get(f"{self._model.blocks[index]}.{name}")
            if norm:
                norm.add_gradient(own)
        return by_input

    def _run(self, index: int, call: Call, hidden: States, weights: dict[str, Float[Tensor, "..."]]) -> States:
        module = self._model.network.get_submodule(self._model.blocks[index])
        output = functional_call(module, weights, (hidden, *call.args), call.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    @torch.no_grad()
    def _weights(self, index: int, layers: dict[str, Quantized] | None = None) -> dict[str, Float[Tensor, "..."]]:
        """A block's parameters as it computes with them, by name inside it; its quantized layers go into `layers`."""
        block = self._model.blocks[index]
        device, dtype = self._model.device, self._model.dtype
        places: dict[str, list[str]] = defaultdict(list)  # the matrices in each parameter
        matrices = self._matrices[index]
        for name, matrix in matrices.items():
            places[matrix.parameter].append(name)
        weights = {}
        for name, parameter in self._model.network.get_submodule(block).named_parameters():
            full = f"{block}.{name}"
            if full in self.norms:
                weights[name] = self.norms[full].value().to(dtype)
            elif not any(layer in self._layers for layer in places[name]):
                weights[name] = self._tensor(full).to(dtype)
            else:  # also where a format calls its codes by the parameter's name
                # The same memory for every block: what a block gave up is not always fit for the next one's weights.
                place = (index if self._keeps_all else 0, name, parameter.shape)
                if place not in self._rooms:
                    self._rooms[place] = torch.empty(parameter.shape, dtype=dtype, device=device)
                weights[name] = self._rooms[place].detach()
                for layer in places[name]:
                    matrices[layer].of(weights[name]).copy_(self._matrix(layer, layers))
        return weights

    def _matrix(self, name: str, layers: dict[str, Quantized] | None) -> Float[Tensor, "rows columns"]:
        if name not in self._layers:  # an expert that is not quantized, beside others that are
            return self._tensor(f"{name}.weight")
        quantized = self.quantized(name)
        if layers is not None:
            layers[name] = quantized
        tuned = self.values[name].applied(quantized) if name in self.values else quantized
        return tuned.dequantize(self._model.dtype)

    def _matrices_of(self, block: str) -> Mapping[str, Matrix]:
        """The places of the block's weight matrices, by the layers' full names."""
        matrices = block_matrices(self._model.network.get_submodule(block))
        return {f"{block}.{name}": matrix for name, matrix in matrices.items()}

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self._model.location}: the quantized model lacks the tensor {name}")
        tensor: Tensor = self._tensors[name][...]
        return tensor.to(self._model.device)
