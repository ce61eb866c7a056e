"""How much what a model predicts depends on each row of its layers: squared gradients, one block at a time."""

from collections.abc import Callable, Collection, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dashq.errors import CheckpointError
from dashq.model import Block, Model, block_matrices
from dashq.stream import Stream, predicting

# Enough for means over many weights; the states between all blocks are kept for so many tokens.
GRADIENT_TOKENS = 4096


@torch.no_grad()
def row_effects(
    model: Model,
    layers: Collection[str],
    tokens: Int[Tensor, "samples tokens"],
    seed: int,
    listen: Callable[[int], None] = lambda index: None,
) -> Mapping[str, Float[Tensor, " rows"]]:
    """The mean over tokens of Σ (∂ log p(y) / ∂ w)² over each row's weights w, with y drawn from the model itself.

    Summed over the rows it is the trace of the Fisher information of the layer's weights, in nats per token. Forward
    through the blocks, then back: in memory are one block with its gradients and the states between all blocks. Only
    the first samples count, up to `GRADIENT_TOKENS`. `listen` hears the number of blocks done, forward and back.
    """
    tokens = tokens[: max(1, GRADIENT_TOKENS // tokens.shape[1])]
    with model.outside():
        stream = Stream(model, tokens)
    inputs = []
    for index in range(len(model.blocks)):
        with model.block(index) as block:
            inputs.append(stream.batches)
            stream.advance(block.module, index)
        listen(index + 1)
    gradients = _of_the_last_states(model, tokens, stream, seed)
    effects: dict[str, Float[Tensor, " rows"]] = {}
    for index in reversed(range(len(model.blocks))):
        with model.block(index) as block:
            found = _back_through(
                block,
                index,
                [name for name in layers if name.startswith(f"{block.name}.")],
                stream,
                inputs.pop(),
                gradients,
            )
        effects |= {name: squares.cpu() / tokens.numel() for name, squares in found.items()}
        listen(2 * len(model.blocks) - index)
    return effects


@torch.enable_grad()
def _of_the_last_states(
    model: Model, tokens: Int[Tensor, "samples tokens"], stream: Stream, seed: int
) -> list[Float[Tensor, "batch tokens width"]]:
    """By batch, the gradients of the log-likelihood of tokens that the model itself draws, one sample at a time."""
    generator = torch.Generator(model.device).manual_seed(seed)
    gradients = []
    with predicting(model) as predict:
        samples = iter(tokens.split(1))
        for batch in stream.batches:
            mine = []
            for hidden in batch.split(1):
                states = hidden.to(model.device).requires_grad_()
                logits = predict(next(samples), states)[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                mine += torch.autograd.grad(functional.cross_entropy(logits, drawn, reduction="sum"), states)
            gradients.append(torch.cat(mine).cpu())
    return gradients


@torch.enable_grad()
def _back_through(
    block: Block,
    index: int,
    layers: Collection[str],
    stream: Stream,
    inputs: Collection[Float[Tensor, "batch tokens width"]],
    gradients: list[Float[Tensor, "batch tokens width"]],
) -> Mapping[str, Float[Tensor, " rows"]]:
    """Of each layer and row, the sum over batches of its squared gradient; `gradients` become those of the inputs."""
    places = block_matrices(block.module)
    matrices = {name: places[name.removeprefix(f"{block.name}.")] for name in layers}
    parameters = {
        name: block.module.get_parameter(name).requires_grad_()
        for name in dict.fromkeys(matrix.parameter for matrix in matrices.values())
    }
    squares: dict[str, Float[Tensor, " rows"]] = {}
    for batch, hidden in enumerate(inputs):
        states = hidden.to(block.device).requires_grad_()
        output = stream.output(block.module, index, batch, states)
        wanted = [states, *parameters.values()]
        first, *others = torch.autograd.grad(output, wanted, gradients[batch].to(block.device), allow_unused=True)
        gradients[batch] = first.cpu()
        if not first.isfinite().all():
            raise CheckpointError(f"{block.name}: its gradients are NaN or infinite; try `dtype: float32`")
        found = dict(zip(parameters, others, strict=True))
        for name, matrix in matrices.items():
            gradient = found[matrix.parameter]
            if gradient is not None:  # an expert that none of these tokens was sent to
                rows = matrix.of(gradient).float().square().sum(1)
                squares[name] = squares[name] + rows if name in squares else rows
    empty = {name: torch.zeros(len(matrix.of(parameters[matrix.parameter]))) for name, matrix in matrices.items()}
    return empty | squares
