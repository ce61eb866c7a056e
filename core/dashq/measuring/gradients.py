"""The cost of errors in a layer's weights to the model's predictions: gradients of all layers, one block at a time."""

from collections.abc import Callable, Collection, Mapping, Sequence
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
from dashq.processes.group import here

# Enough for means over many rows; for as many tokens the states between all blocks are kept.
SAMPLES, TOKENS = 16, 256


@dataclass(frozen=True, eq=False)
class Errors:
    """The errors of a layer's weights in a sample of its rows, with each choice.

    Each row of the sample stands for as many rows as `row_weights` say.
    """

    layer: Layer
    rows: Int[Tensor, " rows"]
    row_weights: Float[Tensor, " rows"]
    values: Float[Tensor, "choices rows columns"]

    def squares(self, gradient: Float[Tensor, "all_rows columns"]) -> Float[Tensor, " choices"]:
        """Σ over the layer's rows of (error · gradient)², for each choice, in float64."""
        rows = gradient[self.rows.to(gradient.device)].float()
        # For each choice and row, the loss's change to first order: error · gradient over the row's columns.
        products = torch.einsum("crk,rk->cr", self.values.to(rows), rows)
        return products.square().cpu().double() @ self.row_weights.double()


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
    is over samples. Products of different rows' errors are left out, and of the two errors that a row of embeddings
    makes where it is the head's as well. Forward through the blocks, then back: in memory
    are one block with its gradients and the states between all blocks, of the first `SAMPLES` samples' first `TOKENS`
    tokens. `listen` hears the number of blocks done, forward and back. Raises `CheckpointError` where gradients are NaN
    or infinite.
    """
    tokens = tokens[:SAMPLES, :TOKENS]
    own = here().own(len(tokens))
    squares = {name: torch.zeros(len(tokens), len(error.values), dtype=torch.float64) for name, error in errors.items()}
    if len(own):
        own_squares = {name: sums[own.start : own.stop] for name, sums in squares.items()}  # views
        _of_samples(model, errors, tokens[own.start : own.stop], (seed, own.start), own_squares, listen)
    for rank in range(here().count):
        if len(theirs := here().own(len(tokens), rank)):
            here().broadcast([sums[theirs.start : theirs.stop] for sums in squares.values()], rank)
    return {name: sums.sum(0) / (2 * tokens.numel()) for name, sums in squares.items()}


def _of_samples(
    model: Model,
    errors: Mapping[str, Errors],
    tokens: Int[Tensor, "samples tokens"],
    seed: tuple[int, int],
    squares: Mapping[str, Float[Tensor, "samples choices"]],
    listen: Callable[[int], None],
) -> None:
    """Add to the `squares` of each sample; the `seed` is with the number of the first one among all."""
    stream = Stream(model, tokens, samples_per_batch=1)
    inputs = []
    for block in model.walk():
        inputs.append(stream.batches)
        stream.advance(block)
        listen(block.index + 1)
    outside = {name: error for name, error in errors.items() if error.layer.role != "linear"}
    gradients = _of_the_last_states(model, tokens, stream, seed, outside, squares)
    for block in model.walk(backwards=True):
        own_errors = {name: error for name, error in errors.items() if error.layer.block == block.name}
        _back_through(block, own_errors, stream, inputs.pop(), gradients, squares)
        listen(2 * len(model.blocks) - block.index)
    _back_to_embeddings(model, tokens, gradients, outside, squares)


@torch.enable_grad()
def _of_the_last_states(
    model: Model,
    tokens: Int[Tensor, "samples tokens"],
    stream: Stream,
    seed: tuple[int, int],
    outside: Mapping[str, Errors],
    squares: Mapping[str, Float[Tensor, "samples choices"]],
) -> list[Float[Tensor, "*copies sample tokens width"]]:
    """The gradients, sample by sample, of the log-likelihood of tokens that the model itself draws.

    Those by the head, where it is among the layers `outside`, are added to its `squares`.
    """
    generator, (start, first) = torch.Generator(model.device), seed
    gradients = []
    head = {name: error for name, error in outside.items() if error.layer.role in ("head", "tied")}
    with shell_of(model, head=True) as shell:
        weights = [model.network.get_parameter(f"{name}.weight").requires_grad_() for name in head]
        for number, (sample, hidden) in enumerate(zip(tokens.split(1), stream.batches, strict=True)):
            generator.manual_seed((start + first + number) % 2**64)  # of its own, whoever draws
            states = hidden.to(model.device).requires_grad_()
            logits = shell.predict(sample, states)[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = functional.cross_entropy(logits, drawn, reduction="sum")
            gradient, *by_head = torch.autograd.grad(loss, [states, *weights])
            gradients.append(gradient.cpu())
            for (name, error), by_weight in zip(head.items(), by_head, strict=True):
                squares[name][number].add_(error.squares(by_weight))
    return gradients


@torch.enable_grad()
def _back_to_embeddings(
    model: Model,
    tokens: Int[Tensor, "samples tokens"],
    gradients: Sequence[Float[Tensor, "*copies sample tokens width"]],
    outside: Mapping[str, Errors],
    squares: Mapping[str, Float[Tensor, "samples choices"]],
) -> None:
    """Add to the `squares` of embeddings what follows from the gradients by the first block's inputs."""
    embeddings = {name: error for name, error in outside.items() if error.layer.role in ("embeddings", "tied")}
    if not embeddings:
        return
    with shell_of(model) as shell:
        (name,) = embeddings
        weight = model.network.get_parameter(f"{name}.weight").requires_grad_()
        for number, (sample, gradient) in enumerate(zip(tokens.split(1), gradients, strict=True)):
            hidden, _ = shell.embed(sample)
            (by_weight,) = torch.autograd.grad(hidden, weight, gradient.to(model.device))
            squares[name][number].add_(embeddings[name].squares(by_weight))


@torch.enable_grad()
def _back_through(
    block: Block,
    errors: Mapping[str, Errors],
    stream: Stream,
    inputs: Collection[Float[Tensor, "*copies sample tokens width"]],
    gradients: list[Float[Tensor, "*copies sample tokens width"]],
    squares: Mapping[str, Float[Tensor, "samples choices"]],
) -> None:
    """Add Σ (error · gradient)² over samples and rows to each layer's `squares`, one for each choice of each sample.

    `gradients` are by the block's outputs, one tensor for each sample, and become those by its inputs.
    """
    places = block_matrices(block.module)
    matrices = {name: places[name.removeprefix(f"{block.name}.")] for name in errors}
    names = dict.fromkeys(matrix.parameter for matrix in matrices.values())
    parameters = {name: block.module.get_parameter(name).requires_grad_() for name in names}
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
                squares[name][sample].add_(errors[name].squares(matrix.of(gradient)))
