"""The original model's last hidden states for the text that a tuner learns from, which the walk brings about."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dashq.calibration.stream import Stream
from dashq.calibration.tokens import Drawn
from dashq.model.decoder import Block, Model
from dashq.processes.group import here


@dataclass(frozen=True, eq=False)
class Lesson:
    """A piece of text, and the original model's last hidden states for it; on the CPU."""

    tokens: Int64[Tensor, "1 tokens"]
    states: Float[Tensor, "*copies 1 tokens width"]


class Teacher:
    """The original model on the text to tune on, which goes through the walk's blocks while their weights are its.

    Each batch is passed by one process: who does it changes no number.
    """

    def __init__(self, model: Model, drawn: Drawn) -> None:
        """Embed the pieces; reads what lies outside the blocks, and the first block."""
        self._samples = len(drawn.samples)
        self._tokens = torch.cat([drawn.samples, drawn.held_out])
        self._stream = Stream(model, self._tokens)

    def pass_original(self, block: Block) -> None:
        """Move on, while the block's weights are the original's."""
        batches = range(len(self._stream.batches))
        self._stream.advance(block, batches[here().rank :: here().count])

    def lessons(self) -> tuple[list[Lesson], list[Lesson]]:
        """The samples to learn from and the held-out pieces, once every block was passed; the same in all processes."""
        for batch, passed in enumerate(self._stream.batches):
            here().broadcast([passed], batch % here().count)
        states = [piece for batch in self._stream.batches for piece in batch.split(1)]
        pieces = [Lesson(tokens, own) for tokens, own in zip(self._tokens.split(1), states, strict=True)]
        return pieces[: self._samples], pieces[self._samples :]
