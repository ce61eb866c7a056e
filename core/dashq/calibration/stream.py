"""The calibration batches on their way through the blocks."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from dashq.calibration.shares import TOKENS_PER_BATCH, Shares
from dashq.calibration.shell import Call, shell_of
from dashq.model.decoder import Block, Model
from dashq.processes.group import here


class StopForward(Exception):
    """Raised by a hook when what comes after it in the block need not be computed."""


def stop_forward(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook that ends a batch's way through a block at the layer that it is attached to."""
    raise StopForward


class Stream:
    """Hidden states of all batches between two blocks, on the CPU, and every block's other inputs.

    `shares` are the batches of each share of the samples, `share_count` is the number of shares in all processes. A
    block is called as the model's own forward pass calls it, so that families need no code of their own.
    """

    def __init__(
        self,
        model: Model,
        tokens: Int[Tensor, "samples tokens"],
        samples_per_batch: int | None = None,
        shares: Shares | None = None,
    ) -> None:
        """Embed the tokens, and learn from the model's own forward pass how it calls each block.

        With `shares`, which say how samples are cut into batches, only this process's own samples are embedded. Reads
        what lies outside the blocks, and the first block. Raises `CheckpointError` where blocks hand each other more
        than hidden states.
        """
        samples = samples_per_batch or max(1, TOKENS_PER_BATCH // tokens.shape[1])
        if shares:
            samples, tokens = shares.samples_per_batch, tokens[shares.own_samples]
        self.tokens = tokens
        self.is_spread = shares is not None and here().count > 1  # over several processes
        self.share_count = shares.count if shares else 1
        self.shares = shares.own_batches if shares else [range(-(-len(tokens) // samples))]
        self.device = model.device
        self._batches: list[Float[Tensor, "*copies samples tokens width"]] = []
        self._calls: list[list[Call]] = []
        distinct: list[Tensor] = []
        with shell_of(model) as shell:
            for batch in tokens.split(samples):
                hidden, calls = shell.embed(batch)
                self._batches.append(hidden.cpu())
                self._calls.append(
                    [Call(_shared(call.args, distinct), _shared(call.kwargs, distinct)) for call in calls]
                )

    def twin(self) -> "Stream":
        """Another stream that goes its own way from here."""
        twin = copy.copy(self)
        twin._batches = list(self._batches)
        return twin

    @property
    def batches(self) -> tuple[Float[Tensor, "*copies samples tokens width"], ...]:
        """The hidden states where the stream is now."""
        return tuple(self._batches)

    def output(
        self, block: Block, batch: int, hidden: Float[Tensor, "*copies samples tokens width"]
    ) -> Float[Tensor, "*copies samples tokens width"]:
        """The block's output for these hidden states, with the other inputs that it has for a batch."""
        return hidden_states(self._call(block, batch, hidden)())

    def calls(self, block: Block) -> list[Callable[[], Any]]:
        """The call of the block for each batch, which returns what the block returns."""
        return [self._call(block, batch, hidden) for batch, hidden in enumerate(self._batches)]

    def outputs(self, block: Block) -> Iterator[Float[Tensor, "*copies samples tokens width"]]:
        """Run every batch through the block."""
        for batch, hidden in enumerate(self._batches):
            yield self.output(block, batch, hidden)

    def observe(
        self, block: Block, first: tuple["Stream", Block] | None = None, batches: Iterable[int] | None = None
    ) -> None:
        """Run every batch, or some of them, through the block for the sake of the hooks on it, as far as they want.

        Before each batch the same one of the `first` stream runs through the block that belongs to it.
        """
        pairs = [(self, block)] if first is None else [first, (self, block)]
        for batch in range(len(self._batches)) if batches is None else batches:
            for stream, other in pairs:
                with suppress(StopForward):
                    stream.output(other, batch, stream._batches[batch])

    def advance(self, block: Block, batches: Iterable[int] | None = None) -> None:
        """Replace every batch, or some of them, by the block's output for it, one at a time."""
        for batch in range(len(self._batches)) if batches is None else batches:
            self._batches[batch] = self.output(block, batch, self._batches[batch]).cpu()

    def replace(self, batches: Sequence[Float[Tensor, "*copies _ tokens width"]]) -> None:
        """Move on to hidden states that were computed elsewhere, one tensor for each batch."""
        self._batches = list(batches)

    def _call(
        self, block: Block, batch: int, hidden: Float[Tensor, "*copies samples tokens width"]
    ) -> Callable[[], Any]:
        call = self._calls[batch][block.index]
        return partial(block.module, hidden.to(self.device), *call.args, **call.kwargs)


def hidden_states(output: Any) -> Float[Tensor, "*copies samples tokens width"]:
    """The hidden states in what a block returns."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _shared(value: Any, distinct: list[Shaped[Tensor, "..."]]) -> Any:
    """The same value, made of `distinct` tensors wherever they are equal, since batches share masks and tables.

    Tensors that equal none of them are added to them.
    """
    if isinstance(value, Tensor):
        for other in distinct:
            if other is value or (other.shape == value.shape and other.dtype == value.dtype and other.equal(value)):
                return other
        distinct.append(value)
        return value
    if type(value) in (tuple, list):
        return type(value)(_shared(item, distinct) for item in value)
    if isinstance(value, dict):
        return {key: _shared(item, distinct) for key, item in value.items()}
    return value
