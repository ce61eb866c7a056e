"""Judge a result at the end of its run: its predictions beside those of the original, in the memory of one block."""

import torch
from jaxtyping import Int64
from torch import Tensor

from dashq.calibration.shell import shell_of
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import Drawn
from dashq.measuring.predictions import PredictionFigures, exponential
from dashq.model.decoder import Block, Model
from dashq.results.judged import Judgement
from dashq.tuning.student import Student

TOKENS = 1024  # that are judged on: seconds beside a run, and enough to tell a model that works from one that does not


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
        predictions, device, first = PredictionFigures(), self._model.device, self._unjudged
        originals, quantized = (torch.cat(stream.batches).split(1) for stream in (self._original, self._quantized))
        with shell_of(self._model, head=True) as shell:
            for tokens, original, states in zip(self._tokens.split(1), originals, quantized, strict=True):
                hidden = student.forward(shell, tokens, keep=False).states if student else states.to(device)
                expected = shell.predict(tokens, original.to(device))[0, first - 1 : -1]
                predicted = shell.predict(tokens, hidden, student.outside if student else {})[0, first - 1 : -1]
                predictions.add(predicted, tokens[0, first:].to(device), expected)
        return _judgement(predictions, self._held_out)


def _judgement(predictions: PredictionFigures, held_out: bool) -> Judgement:
    """The figures of predictions beside the original's, with their standard errors."""
    perplexity, perplexity_error = exponential(predictions.loss)
    original_perplexity, original_error = exponential(predictions.original_loss)
    _, ratio_error = exponential(predictions.excess)
    return Judgement(
        tokens=predictions.loss.tokens,
        held_out=held_out,
        divergence=predictions.divergence.value,
        divergence_error=predictions.divergence.error,
        agreement=predictions.agreement.value or 0.0,
        agreement_error=predictions.agreement.error,
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        original_perplexity=original_perplexity,
        original_perplexity_error=original_error,
        ratio_error=ratio_error,
    )
