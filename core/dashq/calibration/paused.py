"""Passes through a block that pause where its layers are given their inputs, and go on when those are solved."""

from collections.abc import Iterator, Sequence
from contextvars import copy_context
from typing import Any

from greenlet import getcurrent, greenlet
from jaxtyping import Float
from torch import Tensor

from dashq.calibration.stream import Stream, hidden_states
from dashq.device import free_memory
from dashq.errors import CheckpointError
from dashq.model.decoder import Block, Model
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Calibration

# Memory that paused passes may take, as a share of what is free.
SHARE_OF_FREE_MEMORY = 0.5


def paused_bytes(model: Model, plans: Sequence[LayerPlan], text: Calibration) -> int:
    """Memory in bytes that the passes of all samples through a block take at most while they pause.

    A token's are the block's input, its norm, what is left of queries, keys and values and of turned ones, and what the
    layer is given.
    """
    width: int = model.network.config.get_text_config().hidden_size
    columns = max((plan.layer.columns for plan in plans if plan.layer.expert is None), default=0)
    tokens = (2 if text.corrects else 1) * text.samples * text.sequence_length
    return tokens * (6 * width + columns) * model.dtype.itemsize


def passes_pause(model: Model, plans: Sequence[LayerPlan], text: Calibration) -> bool:
    """True where layers are solved one after the other, and paused passes fit into the memory that is free now."""
    if text.propagate != "sequential":
        return False
    return paused_bytes(model, plans, text) <= SHARE_OF_FREE_MEMORY * free_memory(model.device)


class PausedPasses:
    """One pass through a block for each batch of a stream, which pauses whenever it comes to one of some layers.

    A pass is a greenlet: a hook on each layer switches back to who asked for its inputs, and the frames of the model's
    own forward, with all that the rest of the block needs, lie still until the pass is asked to go on.
    """

    def __init__(self, stream: Stream, block: Block, names: Sequence[str]) -> None:
        """`names` are the block's layers to pause at; each is called once in a pass."""
        self._stream = stream
        self._names = {block.linears[name]: name for name in names}
        # The bare method is the hook: in a function of ours, jaxtyping would mix up the frames of several passes.
        self._handles = [module.register_forward_pre_hook(getcurrent().switch) for module in self._names]
        self._passes = [greenlet(lambda _, call=call: call()) for call in stream.calls(block)]
        for each in self._passes:
            each.gr_context = copy_context()
        self._outputs: list[Tensor | None] = [None] * len(self._passes)
        self._awaited: list[dict[str, Tensor]] = [{} for _ in self._passes]

    def inputs(self, names: Sequence[str]) -> Iterator[Float[Tensor, "*batch columns"] | None]:
        """The tensor that each batch gives to the layers `names`, which share it; None where it reaches none of them.

        The passes pause before the first of them. Raises a `CheckpointError` where a batch calls layers in another
        order, or gives these different tensors.
        """
        for batch in range(len(self._passes)):
            arrived = self._go_on(batch)
            if arrived is None:
                yield None
                continue
            name, x = arrived
            if name not in names:
                raise CheckpointError(f"{name} is called before {names[0]} in some batches only: not supported")
            self._awaited[batch] |= {other: x for other in names if other != name}
            yield x

    def finish(self) -> None:
        """Run all passes to their end, and move the stream on to their outputs."""
        for batch in range(len(self._passes)):
            if (arrived := self._go_on(batch)) is not None:
                raise CheckpointError(f"{arrived[0]} is called last in some batches only: not supported")
        self._stream.replace([output for output in self._outputs if output is not None])

    def close(self) -> None:
        """Give up passes that are not finished, with all that they hold, and take the hooks away."""
        for handle in self._handles:
            handle.remove()
        for each in self._passes:
            if not each.dead:
                each.throw()

    def _go_on(self, batch: int) -> tuple[str, Tensor] | None:
        """Let a pass go on to the next layer whose input is not known yet; that layer's name, and its input."""
        this = self._passes[batch]
        while not this.dead:
            arrived: Any = this.switch(None)
            if this.dead:
                self._outputs[batch] = hidden_states(arrived).cpu()
                break
            module, (x, *_) = arrived
            name, awaited = self._names[module], self._awaited[batch]
            if name not in awaited:
                return name, x
            if awaited.pop(name) is not x:
                raise CheckpointError(f"{name} is given the inputs of other layers in some batches only: not supported")
        return None
