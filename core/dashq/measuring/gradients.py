"""What errors in a layer's weights cost the model's predictions: gradients of all layers, one block at a time."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dashq.calibration.stream import Stream, predicting
from dashq.errors import CheckpointError
from dashq.model.decoder import Block, Model, block_matrices

# Enough for means over many rows; the states between all blocks are kept for so many tokens.
SAMPLES, TOKENS = 16, 256


@dataclass(frozen=True, eq=False)
class Errors:
    """Of some `rows` of a layer, the errors of its weights with each choice."""

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
    """By layer, ½ Σ over rows of (error · gradient)², in nats per token: what the errors of one layer alone cost.

    The gradient is that of log p(y), summed over a sample of the tokens, with y drawn from the model itself; the mean
    is over samples. Products of different rows' errors are left out. Forward through the blocks, then back: in memory
    are one block with its gradients and the states between all blocks, of the first `SAMPLES` samples' first `TOKENS`
    tokens. `listen` hears the number of blocks done, forward and back.
    """
    tokens = tokens[:SAMPLES, :TOKENS]
    with model.outside():
        stream = Stream(model, tokens, samples_per_batch=1)
    inputs = []
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            inputs.append(stream.batches)
            stream.advance(block.module, index)
        listen(index + 1)
    gradients = _of_the_last_states(model, tokens, stream, seed)
    losses: dict[str, Float[Tensor, " choices"]] = {}
    for index in reversed(range(len(model.blocks))):
        with model.block(index) as block:
            mine = {name: errors[name] for name in errors if name.startswith(f"{block.name}.")}
            found = _back_through(block, index, mine, stream, inputs.pop(), gradients)
        losses |= {name: squares / (2 * tokens.numel()) for name, squares in found.items()}
        listen(2 * len(model.blocks) - index)
    return losses


@torch.enable_grad()
def _of_the_last_states(
    model: Model, tokens: Int[Tensor, "samples tokens"], stream: Stream, seed: int
) -> list[Float[Tensor, "sample tokens width"]]:
    """By sample, the gradients of the log-likelihood of tokens that the model itself draws."""
    generator = torch.Generator(model.device).manual_seed(seed)
    gradients = []
    with predicting(model) as predict:
        for sample, hidden in zip(tokens.split(1), stream.batches, strict=True):
            states = hidden.to(model.device).requires_grad_()
            logits = predict(sample, states)[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, drawn, reduction="sum"), states)
            gradients.append(gradient.cpu())
    return gradients


@torch.enable_grad()
def _back_through(
    block: Block,
    index: int,
    errors: Mapping[str, Errors],
    stream: Stream,
    inputs: Collection[Float[Tensor, "sample tokens width"]],
    gradients: list[Float[Tensor, "sample tokens width"]],
) -> Mapping[str, Float[Tensor, " choices"]]:
    """Of each layer and choice, Σ (error · gradient)² over samples and rows; `gradients` become those of the inputs."""
    places = block_matrices(block.module)
    matrices = {name: places[name.removeprefix(f"{block.name}.")] for name in errors}
    names = dict.fromkeys(matrix.parameter for matrix in matrices.values())
    parameters = {name: block.module.get_parameter(name).requires_grad_() for name in names}
    squares = {name: torch.zeros(len(error.values), dtype=torch.float64) for name, error in errors.items()}
    for sample, hidden in enumerate(inputs):
        states = hidden.to(block.device).requires_grad_()
        output = stream.output(block.module, index, sample, states)
        wanted = [states, *parameters.values()]
        first, *others = torch.autograd.grad(output, wanted, gradients[sample].to(block.device), allow_unused=True)
        if not first.isfinite().all():
            raise CheckpointError(f"{block.name}: its gradients are NaN or infinite; try `dtype: float32`")
        gradients[sample] = first.cpu()
        found = dict(zip(parameters, others, strict=True))
        for name, matrix in matrices.items():
            gradient = found[matrix.parameter]
            if gradient is not None:  # None: an expert that none of these tokens was sent to
                rows = matrix.of(gradient)[errors[name].rows.to(block.device)].float()
                products = torch.einsum("crk,rk->cr", errors[name].values.to(rows), rows)
                squares[name] += products.square().sum(1, dtype=torch.float64).cpu()
    return squares
