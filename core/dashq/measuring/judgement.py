"""Judge a result at the end of its run: its predictions beside those of the original, in the memory of one block."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.nn import functional

from dashq.calibration.shell import shell_of
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import Drawn
from dashq.model.decoder import Block, Model
from dashq.results.report import Judgement
from dashq.tuning.student import Student

TOKENS = 1024  # that are judged on: seconds beside a run, and enough to tell a model that works from one that does not
TOKENS_PER_PIECE = 256  # whose logits are in memory in float32 at a time


def judged_tokens(drawn: Drawn) -> Int64[Tensor, "samples tokens"]:
    """The pieces to judge on: those that calibration does not see, or some of its own where its text has no others."""
    pieces = drawn.held_out if len(drawn.held_out) else drawn.samples
    length = min(TOKENS, pieces.shape[1])
    return pieces[: max(1, TOKENS // length), :length]


class Judge:
    """The original and the quantized model on a few pieces of text, which go through the walk's blocks with it."""

    def __init__(self, model: Model, drawn: Drawn) -> None:
        """Embed the pieces; reads what lies outside the blocks, and the first block."""
        self._model = model
        self._tokens = judged_tokens(drawn)
        self._held_out = bool(len(drawn.held_out))
        self._unjudged = max(1, drawn.beginning)  # tokens that nothing stands before, or that begin every text
        self._original = Stream(model, self._tokens)
        self._quantized = self._original.twin()

    def pass_original(self, block: Block) -> None:
        """Move the original model on, while the block's weights are its own."""
        self._original.advance(block)

    def pass_quantized(self, block: Block) -> None:
        """Move the quantized model on, when the block's weights are those of the result."""
        self._quantized.advance(block)

    @torch.no_grad()
    def judgement(self, student: Student | None = None) -> Judgement:
        """The comparison, once both models have passed every block; that of a `student` in the quantized one's place.

        Reads what lies outside the blocks, and the first block.
        """
        sums, device, first = _Sums(), self._model.device, self._unjudged
        originals, quantized = (torch.cat(stream.batches).split(1) for stream in (self._original, self._quantized))
        with shell_of(self._model, head=True) as shell:
            for tokens, original, states in zip(self._tokens.split(1), originals, quantized, strict=True):
                hidden = student.forward(shell, tokens, keep=False).states if student else states.to(device)
                expected = shell.predict(tokens, original.to(device))[0, first - 1 : -1]
                predicted = shell.predict(tokens, hidden, student.outside if student else {})[0, first - 1 : -1]
                pieces = (x.split(TOKENS_PER_PIECE) for x in (expected, predicted, tokens[0, first:].to(device)))
                for piece in zip(*pieces, strict=True):
                    sums.add(*piece)
        return sums.judgement(self._held_out)


@dataclass
class _Sums:
    """Sums over tokens."""

    tokens: int = 0
    divergence: float = 0.0
    agreement: int = 0
    loss: float = 0.0
    original_loss: float = 0.0

    def add(
        self,
        expected: Float[Tensor, "tokens words"],
        predicted: Float[Tensor, "tokens words"],
        next_tokens: Int[Tensor, " tokens"],
    ) -> None:
        """Take in the logits of both models for the same tokens, and the tokens that follow."""
        original, quantized = (logits.float().log_softmax(-1) for logits in (expected, predicted))
        self.tokens += len(next_tokens)
        self.divergence += float(functional.kl_div(quantized, original, reduction="sum", log_target=True))
        self.agreement += int((original.argmax(-1) == quantized.argmax(-1)).sum())
        self.loss += float(functional.nll_loss(quantized, next_tokens, reduction="sum"))
        self.original_loss += float(functional.nll_loss(original, next_tokens, reduction="sum"))

    def judgement(self, held_out: bool) -> Judgement:
        """The means over the tokens."""
        return Judgement(
            tokens=self.tokens,
            held_out=held_out,
            divergence=_number(self.divergence / self.tokens),
            agreement=self.agreement / self.tokens,
            perplexity=_perplexity(self.loss / self.tokens),
            original_perplexity=_perplexity(self.original_loss / self.tokens),
        )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _perplexity(loss: float) -> float | None:
    # The largest loss whose exponential is a number; a higher one says no more.
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else None
