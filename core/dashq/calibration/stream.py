"""The calibration batches on their way through the blocks."""

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from dashq.errors import CheckpointError
from dashq.model.decoder import Model

# Tokens per forward pass of a block: enough to keep matrix products busy, few enough to stay small beside a block.
TOKENS_PER_BATCH = 4096


@dataclass(frozen=True, eq=False)
class Call:
    """What the model hands to a block besides the hidden states: masks, rotary tables and the like."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class StopForward(Exception):
    """Raised by a hook when what comes after it in the block need not be computed."""


class Stream:
    """Hidden states of all batches between two blocks, on the CPU, and every block's other inputs."""

    def __init__(
        self, model: Model, tokens: Int[Tensor, "samples tokens"], samples_per_batch: int | None = None
    ) -> None:
        """Embed the tokens, and learn from the model's own forward pass how it calls each block."""
        samples = samples_per_batch or max(1, TOKENS_PER_BATCH // tokens.shape[1])
        self._device = model.device
        self._batches: list[Float[Tensor, "samples tokens width"]] = []
        self._calls: list[list[Call]] = []
        seen: list[Tensor] = []
        blocks = [model.network.get_submodule(name) for name in model.blocks]
        with model.block(0), _standing_in(blocks) as recorder:
            for batch in tokens.split(samples):
                model.network.base_model(input_ids=batch.to(model.device), use_cache=False)
                hidden, calls = recorder.take()
                self._batches.append(hidden.cpu())
                self._calls.append([Call(_shared(c.args, seen), _shared(c.kwargs, seen)) for c in calls])

    def twin(self) -> "Stream":
        """Another stream that goes its own way from here."""
        twin = copy.copy(self)
        twin._batches = list(self._batches)
        return twin

    @property
    def batches(self) -> tuple[Float[Tensor, "samples tokens width"], ...]:
        """The hidden states where the stream is now."""
        return tuple(self._batches)

    def output(
        self, block: nn.Module, index: int, batch: int, hidden: Float[Tensor, "samples tokens width"]
    ) -> Float[Tensor, "samples tokens width"]:
        """What block `index` makes of these hidden states, called as it is for a batch."""
        call = self._calls[batch][index]
        output = block(hidden.to(self._device), *call.args, **call.kwargs)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def outputs(self, block: nn.Module, index: int) -> Iterator[Float[Tensor, "samples tokens width"]]:
        """Run every batch through block `index`."""
        for batch, hidden in enumerate(self._batches):
            yield self.output(block, index, batch, hidden)

    def observe(self, block: nn.Module, index: int, original: tuple["Stream", nn.Module] | None = None) -> None:
        """Run every batch through block `index` for the sake of the hooks on it, as far as they want.

        Before each the same batch of another stream runs through another block.
        """
        pairs = [*([original] if original else []), (self, block)]
        for batch in range(len(self._batches)):
            for stream, module in pairs:
                with suppress(StopForward):
                    stream.output(module, index, batch, stream._batches[batch])

    def advance(self, block: nn.Module, index: int) -> None:
        """Replace every batch by its output of block `index`, one at a time."""
        for batch, output in enumerate(self.outputs(block, index)):
            self._batches[batch] = output.cpu()


Predict = Callable[[Int[Tensor, "samples tokens"], Float[Tensor, "samples tokens width"]], Float[Tensor, "..."]]


@contextmanager
def predicting(model: Model) -> Generator[Predict]:
    """The model without its blocks: the logits that it makes of tokens and of what the last block gave for them."""
    blocks = [model.network.get_submodule(name) for name in model.blocks]

    def predict(
        tokens: Int[Tensor, "samples tokens"], hidden: Float[Tensor, "samples tokens width"]
    ) -> Float[Tensor, "..."]:
        def put(module: nn.Module, inputs: Any, output: Any) -> Any:
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = blocks[-1].register_forward_hook(put)
        try:
            logits: Tensor = model.network(input_ids=tokens.to(model.device), use_cache=False).logits
        finally:
            handle.remove()
        return logits

    with model.outside(head=True), model.block(0), _standing_in(blocks):
        yield predict


class _Recorder:
    """Stands in for every block's forward: notes how the block is called and passes its input on.

    The first block really runs once, to show whether this model's blocks return a tensor or a tuple, and of what.
    """

    def __init__(self, first: nn.Module) -> None:
        self._first = first
        self._made: Any = None
        self._hidden: list[Tensor] = []
        self._calls: list[Call] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        if self._made is None:
            self._made = type(self._first).forward(self._first, x, *args, **kwargs)
        more = self._made[1:] if isinstance(self._made, tuple) else ()
        if any(given is made for given in (*args, *kwargs.values()) for made in more if isinstance(made, Tensor)):
            raise CheckpointError(
                f"{type(self._first).__name__}: blocks that hand each other more than hidden states are not supported"
            )
        self._hidden.append(x)
        self._calls.append(Call(args, kwargs))
        return (x, *more) if isinstance(self._made, tuple) else x

    def take(self) -> tuple[Tensor, list[Call]]:
        """The first block's input and all calls of one forward pass; ready for the next one."""
        hidden, calls = self._hidden[0], self._calls
        self._hidden, self._calls = [], []
        return hidden, calls


@contextmanager
def _standing_in(blocks: Sequence[nn.Module]) -> Generator[_Recorder]:
    recorder = _Recorder(blocks[0])
    try:
        for block in blocks:
            vars(block)["forward"] = recorder
        yield recorder
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _shared(value: Any, seen: list[Tensor]) -> Any:
    """The same value, made of tensors seen before wherever they are equal: batches share masks and tables."""
    if isinstance(value, Tensor):
        for other in seen:
            if other is value or (other.shape == value.shape and other.dtype == value.dtype and other.equal(value)):
                return other
        seen.append(value)
        return value
    if type(value) in (tuple, list):
        return type(value)(_shared(item, seen) for item in value)
    if isinstance(value, dict):
        return {key: _shared(item, seen) for key, item in value.items()}
    return value
