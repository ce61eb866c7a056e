"""Judge a result at the end of its run: its predictions beside those of the original, in the memory of one block."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
from jaxtyping import Int64
from torch import Tensor

from dashq.calibration.shell import Shell, shell_of
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import Drawn
from dashq.measuring.predictions import TOKENS_PER_PIECE, PredictionFigures, exponential
from dashq.model.decoder import Block, Model
from dashq.processes.group import here
from dashq.recipe.plan import LayerPlan
from dashq.recipe.recipe import Recipe
from dashq.results.judged import Judgement
from dashq.tuning.student import Student

TOKENS = 1024  # that are judged on: seconds beside a run, and enough to tell a model that works from one that does not

ORIGINAL, QUANTIZED = range(2)  # the two models


def is_read_back(recipe: Recipe, plans: Sequence[LayerPlan]) -> bool:
    """True where the result is judged from its own tensors: the blocks that were passed on the way are not all of it.

    They had the values of before the tuner, and were given the original's embeddings.
    """
    return recipe.tuner is not None or any(plan.layer.role != "linear" for plan in plans)


def judged_tokens(drawn: Drawn) -> Int64[Tensor, "samples tokens"]:
    """The pieces to judge on: those that calibration does not see, or some of its own where its text has no others."""
    pieces = drawn.held_out if len(drawn.held_out) else drawn.samples
    length = min(TOKENS, pieces.shape[1])
    return pieces[: max(1, TOKENS // length), :length]


class Judge:
    """The original and the quantized model on a few pieces of text, which go through the walk's blocks with it.

    Each piece in each model is one process's, and so are the predictions behind some tokens in a row: who computes them
    changes no figure.
    """

    def __init__(self, model: Model, drawn: Drawn, read_back: bool = False) -> None:
        """Embed the pieces; reads what lies outside the blocks, and the first block.

        Where the result is `read_back`, the original alone goes with the walk.
        """
        self._model, self._read_back = model, read_back
        self._tokens = judged_tokens(drawn)
        self._held_out = bool(len(drawn.held_out))
        self._unjudged = max(1, drawn.beginning)  # tokens that nothing stands before, or that begin every text
        self._original = Stream(model, self._tokens, samples_per_batch=1)
        self._quantized = self._original.twin()

    def pass_original(self, block: Block) -> None:
        """Move the original model on, while the block's weights are its own."""
        self._original.advance(block, self._own(ORIGINAL))

    def pass_quantized(self, block: Block) -> None:
        """Move the quantized model on, when the block's weights are those of the result, unless that is read back."""
        if not self._read_back:
            self._quantized.advance(block, self._own(QUANTIZED))

    @torch.no_grad()
    def judgement(self, student: Student | None = None) -> Judgement:
        """The comparison, once both models have passed every block.

        A `student` is the result as it is on disk, where that is read back. Reads what lies outside the blocks, and the
        first block.
        """
        sharing = here().count
        predictions = PredictionFigures()
        with shell_of(self._model, head=True) as shell:
            if student:
                self._pass_student(student, shell)
            self._tell()
            places = [
                (piece, slice(start, start + TOKENS_PER_PIECE))
                for piece, tokens in enumerate(self._tokens)
                for start in range(self._unjudged - 1, len(tokens) - 1, TOKENS_PER_PIECE)
            ]
            own = [
                self._figures(shell, piece, place, student)
                for number, (piece, place) in enumerate(places)
                if number % sharing == here().rank
            ]
        for number in range(len(places)):
            rank = number % sharing
            predictions.extend(here().of(rank, asdict(own.pop(0)) if rank == here().rank else None))
        return _judgement(predictions, self._held_out)

    def _own(self, model: int) -> list[int]:
        """The pieces that this process passes through one of the two models."""
        return [piece for piece in range(len(self._tokens)) if self._passes(piece, model) == here().rank]

    def _passes(self, piece: int, model: int) -> int:
        """The process that passes a piece through one of the two models, which pass at the same time or apart."""
        return (piece if self._read_back else 2 * piece + model) % here().count

    def _pass_student(self, student: Student, shell: Shell) -> None:
        """Send this process's pieces through all blocks of the result."""
        own, batches = self._own(QUANTIZED), [*self._quantized.batches]
        for piece, states in zip(own, student.states(shell, [self._tokens[piece, None] for piece in own]), strict=True):
            batches[piece] = states.cpu()
        self._quantized.replace(batches)

    def _tell(self) -> None:
        """Let all processes have the last hidden states of every piece in both models."""
        for model, stream in ((ORIGINAL, self._original), (QUANTIZED, self._quantized)):
            told = [states.clone() for states in stream.batches]  # what neither has passed here is one tensor in both
            for piece, states in enumerate(told):
                here().broadcast([states], self._passes(piece, model))
            stream.replace(told)

    def _figures(self, shell: Shell, piece: int, place: slice, student: Student | None) -> PredictionFigures:
        """The figures of what both models predict behind some tokens of a piece."""
        tokens, device, figures = self._tokens[piece], self._model.device, PredictionFigures()
        following = tokens[place.start + 1 : place.stop + 1].to(device)
        place = slice(place.start, place.start + len(following))  # nothing follows the last token
        original, quantized = (
            stream.batches[piece][..., place, :].to(device) for stream in (self._original, self._quantized)
        )
        expected = shell.predict(tokens[None, place], original)[0]
        predicted = shell.predict(tokens[None, place], quantized, student.outside if student else {})[0]
        figures.add(predicted, following, expected)
        return figures


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
