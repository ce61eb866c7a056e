"""The experts of a loaded checkpoint: packed in memory, and only those that a batch of tokens needs are unpacked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from dashq.model.mixtures import activate, first_stack, indexed_arguments


class DashqExperts(nn.Module):
    """Takes the place of a model's stacked experts, and is called in the same ways.

    `layers` holds the matrices of each stack that has quantized ones, expert by expert: packed, or a plain
    linear layer for an expert that is not quantized. Biases and other stacks stay parameters of their names.
    """

    def __init__(self, experts: nn.Module, transposed: bool, layers: Mapping[str, Sequence[nn.Module]]) -> None:
        super().__init__()
        self._plain = (experts,)  # in a tuple, so that it is no submodule: it only knows how to activate
        self._transposed, self._first = transposed, first_stack(experts)
        self.num_experts: int = experts.get_parameter("down_proj").shape[0]
        for stack, modules in layers.items():
            delattr(experts, stack)
            self.add_module(stack, nn.ModuleList(modules))
        for name, parameter in experts.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "*batch columns"]:
        """The weighed sum of each token's chosen experts, or every expert's outputs where tokens come dispatched.

        Families call their experts in several ways: with hidden states, chosen experts and their weights in any order
        after the first, or with dispatched hidden states alone.
        """
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if len(tensors) == 1:
            return self._dispatched(tensors[0])
        return self._indexed(*indexed_arguments(tensors)).reshape(tensors[0].shape)

    def dequantized(self, dtype: torch.dtype) -> nn.Module:
        """The model's own module with plain weights again."""
        (experts,) = self._plain
        for name, parameter in self.named_parameters(recurse=False):
            setattr(experts, name, parameter)
        for stack, modules in self.named_children():
            weights: list[Any] = [module.weight for module in modules.children()]
            stacked = torch.stack([weight.mT if self._transposed else weight for weight in weights])
            setattr(experts, stack, nn.Parameter(stacked.to(dtype), requires_grad=False))
        return experts

    def _indexed(
        self,
        hidden: Float[Tensor, "tokens columns"],
        index: Int[Tensor, "tokens chosen"],
        weights: Float[Tensor, "tokens chosen"],
    ) -> Float[Tensor, "tokens columns"]:
        result = torch.zeros_like(hidden)
        if torch.compiler.is_compiling():  # a graph cannot hang on what is chosen: every expert sees every token
            for expert in range(self.num_experts):
                weight = torch.where(index == expert, weights, 0).sum(-1, keepdim=True)
                outputs = self._expert(expert, hidden) * weight
                result += torch.where(weight != 0, outputs, 0).to(result.dtype)
            return result
        for expert in index.unique().tolist():
            tokens, places = torch.where(index == expert)
            outputs = self._expert(expert, hidden[tokens]) * weights[tokens, places, None]
            result.index_add_(0, tokens, outputs.to(result.dtype))
        return result

    def _dispatched(self, x: Float[Tensor, "copies columns"]) -> Float[Tensor, "copies columns"]:
        """Every expert's share of the rows in turn; a row of zeros was not meant for it, and gives zeros."""
        shares = x.chunk(self.num_experts)
        if torch.compiler.is_compiling():
            outputs = [self._expert(expert, share).to(x.dtype) for expert, share in enumerate(shares)]
            return torch.where((x != 0).any(-1, keepdim=True), torch.cat(outputs), 0)
        result = torch.zeros_like(x)
        for expert, share in enumerate(shares):
            rows = (share != 0).any(-1).nonzero().flatten()
            if len(rows):
                result[expert * len(share) + rows] = self._expert(expert, share[rows])
        return result

    def _expert(self, expert: int, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens columns"]:
        inner = activate(self._plain[0], self._product(self._first, expert, x), gated=self._first != "up_proj")
        return self._product("down_proj", expert, inner)

    def _product(self, stack: str, expert: int, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        biases = getattr(self, f"{stack}_bias", None)
        bias = None if biases is None else biases[expert]
        layers = getattr(self, stack)  # a list of modules, or the model's own parameter [experts, …]
        if isinstance(layers, nn.ModuleList):
            product: Tensor = layers[expert](x)
            return product if bias is None else product + bias
        return functional.linear(x, layers[expert].mT if self._transposed else layers[expert], bias)
