"""The cost of errors in a layer's weights to the model's predictions: gradients of all layers, one block at a time."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dashq.calibration.shell import shell_of
from dashq.calibration.stream import Stream
from dashq.data import Layer
from dashq.errors import CheckpointError
from dashq.model.decoder import Block, Model, block_matrices

# Enough for means over many rows; for as many tokens the states between all blocks are kept.
SAMPLES, TOKENS = 16, 256


@dataclass(frozen=True, eq=False)
class Errors:
    """The errors of a layer's weights in a sample of its rows, with each choice."""

    layer: Layer
    rows: Int[Tensor, " rows"]
    values: Float[Tensor, "choices rows columns"]


@torch.no_grad()
def expected_losses(
    model: Model,
    errors: Mapping[str, Errors],
    tokens: Int[Tensor, "samples tokens"],
    seed: int,
    listen: Callable[[int], None] = lambda index: None,
) -> Mapping[str, Float[Tensor, " choices"]]:
    """The expected loss by the errors of each layer alone: ½ Σ over rows of (error · gradient)², in nats per token.

    The gradient is that of log p(y), summed over a sample of the tokens, with y drawn from the model itself; the mean
    is over samples. Products of different rows' errors are left out. Forward through the blocks, then back: in memory
    are one block with its gradients and the states between all blocks, of the first `SAMPLES` samples' first `TOKENS`
    tokens. `listen` hears the number of blocks done, forward and back. Raises `CheckpointError` where gradients are NaN
    or infinite.
    """
    tokens = tokens[:SAMPLES, :TOKENS]
    stream = Stream(model, tokens, samples_per_batch=1)
    inputs = []
    for block in model.walk():
        inputs.append(stream.batches)
        stream.advance(block)
        listen(block.index + 1)
    gradients = _of_the_last_states(model, tokens, stream, seed)
    losses: dict[str, Float[Tensor, " choices"]] = {}
    for block in model.walk(backwards=True):
        own_errors = {name: error for name, error in errors.items() if error.layer.block == block.name}
        squares = _back_through(block, own_errors, stream, inputs.pop(), gradients)
        losses |= {name: sums / (2 * tokens.numel()) for name, sums in squares.items()}
        listen(2 * len(model.blocks) - block.index)
    return losses


@torch.enable_grad()
def _of_the_last_states(
    model: Model, tokens: Int[Tensor, "samples tokens"], stream: Stream, seed: int
) -> list[Float[Tensor, "sample tokens width"]]:
    """The gradients, sample by sample, of the log-likelihood of tokens that the model itself draws."""
    generator = torch.Generator(model.device).manual_seed(seed)
    gradients = []
    with shell_of(model, head=True) as shell:
        for sample, hidden in zip(tokens.split(1), stream.batches, strict=True):
            states = hidden.to(model.device).requires_grad_()
            logits = shell.predict(sample, states)[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, drawn, reduction="sum"), states)
            gradients.append(gradient.cpu())
    return gradients


@torch.enable_grad()
def _back_through(
    block: Block,
    errors: Mapping[str, Errors],
    stream: Stream,
    inputs: Collection[Float[Tensor, "sample tokens width"]],
    gradients: list[Float[Tensor, "sample tokens width"]],
) -> Mapping[str, Float[Tensor, " choices"]]:
    """Σ (error · gradient)² over samples and rows, by layer, of each choice.

    `gradients` are by the block's outputs, one tensor for each sample, and become those by its inputs.
    """
    places = block_matrices(block.module)
    matrices = {name: places[name.removeprefix(f"{block.name}.")] for name in errors}
    names = dict.fromkeys(matrix.parameter for matrix in matrices.values())
    parameters = {name: block.module.get_parameter(name).requires_grad_() for name in names}
    squares = {name: torch.zeros(len(error.values), dtype=torch.float64) for name, error in errors.items()}
    for sample, hidden in enumerate(inputs):
        states = hidden.to(block.device).requires_grad_()
        # Only this block is run again: the chain rule needs the gradient by its outputs, not what comes after them.
        output = stream.output(block, sample, states)
        wanted = (states, *parameters.values())
        by_wanted = torch.autograd.grad(output, wanted, gradients[sample].to(block.device), allow_unused=True)
        if not by_wanted[0].isfinite().all():
            raise CheckpointError(f"{block.name}: its gradients are NaN or infinite; try `dtype: float32`")
        gradients[sample] = by_wanted[0].cpu()
        by_parameter = dict(zip(parameters, by_wanted[1:], strict=True))
        for name, matrix in matrices.items():
            gradient = by_parameter[matrix.parameter]
            if gradient is not None:  # None: an expert that none of these tokens was sent to
                rows = matrix.of(gradient)[errors[name].rows.to(block.device)].float()
                # For each choice and row, the loss's change to first order: error · gradient over the row's columns.
                products = torch.einsum("crk,rk->cr", errors[name].values.to(rows), rows)
                squares[name] += products.square().sum(1, dtype=torch.float64).cpu()
    return squares
