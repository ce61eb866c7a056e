"""The steps of a tuner: a pass forward, the loss at the logits, a pass back; and a check on held-out text at times."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dashq.calibration.shares import TOKENS_PER_BATCH
from dashq.calibration.shell import Shell
from dashq.results.tuned import Tuned, TuningCheck
from dashq.strategies import Tuner
from dashq.tuning.planned import optimizer_for
from dashq.tuning.state import TunerState
from dashq.tuning.student import States, Student
from dashq.tuning.teacher import Lesson

CHECKS = 10  # at most, on held-out text, besides the one before the first step
SAVE_SECONDS = 60.0  # from one saved state to the next
TOKENS_PER_PIECE = 128  # whose logits are in memory at a time

Progress = Callable[[TuningCheck], None]


def checks_of(tuner: Tuner, held_out: int) -> int:
    """The number of checks after the first, at even distances, and one at least.

    Between two of several the steps see as many tokens as are held out or more, so that checks take about a fifth of
    the time at most.
    """
    learned = tuner.epochs * tuner.samples * tuner.sequence_length
    return max(1, min(CHECKS, tuner.steps, learned // held_out))


class Learner:
    """A student on its way through a tuner's steps, which goes on from the state saved at `path` where there is one."""

    def __init__(self, tuner: Tuner, student: Student, shell: Shell, path: Path) -> None:
        """Raises `PluginError` for a tuner that changes nothing, or something else."""
        self._tuner, self._student, self._shell, self._path = tuner, student, shell, path
        optimizer, changed = optimizer_for(tuner, student.tunables)
        for tunable in student.tunables:
            tunable.parameter.requires_grad_(False)
        for tunable in changed:
            tunable.parameter.requires_grad_()
        self._changed: dict[str, int] = {}
        for tunable in changed:
            self._changed[tunable.kind] = self._changed.get(tunable.kind, 0) + tunable.parameter.numel()
        chosen = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._state = TunerState(chosen, optimizer)
        self._state.load(path)

    def learn(self, samples: Sequence[Lesson], held_out: Sequence[Lesson], listen: Progress) -> Tuned:
        """Go through the samples; at the end the student has the best values by the held-out pieces.

        The state is saved at each check, and each minute. `listen` hears the latest check, with the number of steps
        done.
        """
        state, steps = self._state, self._tuner.steps
        checks = checks_of(self._tuner, sum(lesson.tokens.numel() for lesson in held_out))
        checked_at = {round(steps * number / checks) for number in range(1, checks + 1)}
        saved_at = time.monotonic()
        if not state.checks:
            state.check(self._divergence(held_out), None)
        for batch in self._batches(samples):
            listen(replace(state.checks[-1], step=state.step))
            loss = self._step(batch)
            if state.step in checked_at and math.isfinite(loss):
                state.check(self._divergence(held_out), loss)
            if not (math.isfinite(loss) and math.isfinite(state.checks[-1].divergence)):
                state.note = f"it stopped at step {state.step} of {steps}, where predictions are no numbers"
                break
            if state.step in checked_at or time.monotonic() - saved_at >= SAVE_SECONDS:
                state.save(self._path)
                saved_at = time.monotonic()
        listen(replace(state.checks[-1], step=state.step))
        state.take_best()
        state.step = steps
        state.save(self._path)  # whoever takes it over has nothing left to learn
        return Tuned(
            tuner=self._tuner.name,
            samples=sum(lesson.tokens.numel() for lesson in samples),
            held_out=sum(lesson.tokens.numel() for lesson in held_out),
            checks=tuple(check for check in state.checks if math.isfinite(check.divergence)),
            changed=self._changed,
            note=state.note,
        )

    def _batches(self, samples: Sequence[Lesson]) -> Iterator[list[Lesson]]:
        """The samples of each step that is left, in an order that is drawn anew for each epoch."""
        tuner, steps = self._tuner, 0
        generator = torch.Generator().manual_seed(tuner.seed)
        for _ in range(tuner.epochs):
            for numbers in torch.randperm(len(samples), generator=generator).split(tuner.batch):
                if steps == self._state.step:
                    yield [samples[number] for number in numbers.tolist()]
                steps += 1

    def _step(self, batch: Sequence[Lesson]) -> float:
        """One step; returns its mean loss."""
        state = self._state
        for parameter in state.parameters:
            parameter.grad = None
        tokens = torch.cat([lesson.tokens for lesson in batch])
        forward = self._student.forward(self._shell, tokens)
        loss, gradient = self._loss(batch, forward.states)
        if math.isfinite(loss):
            self._student.backward(forward, gradient)
            self._tuner.step(state.optimizer, state.step / self._tuner.steps)
        state.step += 1
        return loss

    def _loss(self, batch: Sequence[Lesson], states: States) -> tuple[float, States]:
        """The mean loss over a batch's tokens, and its gradient by the student's last states.

        The gradients of norms outside the blocks are added to theirs.
        """
        count = sum(lesson.tokens.shape[1] - 1 for lesson in batch)
        gradient, total = torch.zeros_like(states), 0.0
        for row, lesson in enumerate(batch):
            for place, expected, next_tokens in self._pieces(lesson):
                with torch.enable_grad():
                    piece = states[row : row + 1, place].detach().requires_grad_()
                    tokens = lesson.tokens[:, place]
                    predicted = self._shell.predict(tokens, piece, self._student.outside)[0].float()
                    loss = self._tuner.loss(expected, predicted, next_tokens) / count
                    # Only these: the head is as large as a block, and so would its gradient be.
                    loss.backward(inputs=[piece, *self._state.parameters])
                assert piece.grad is not None
                gradient[row : row + 1, place] = piece.grad
                total += float(loss.detach())
        return total, gradient

    @torch.no_grad()
    def _divergence(self, held_out: Sequence[Lesson]) -> float:
        """Σ p (log p - log p̂) in nats per token, of the student's p̂ from the original's p on held-out pieces."""
        total, count = 0.0, 0
        together = max(1, TOKENS_PER_BATCH // held_out[0].tokens.shape[1])
        for start in range(0, len(held_out), together):
            batch = held_out[start : start + together]
            forward = self._student.forward(self._shell, torch.cat([lesson.tokens for lesson in batch]), keep=False)
            for lesson, states in zip(batch, forward.states.split(1), strict=True):
                for place, expected, _ in self._pieces(lesson):
                    predicted = self._shell.predict(lesson.tokens[:, place], states[:, place], self._student.outside)
                    q, p = predicted[0].float().log_softmax(-1), expected.log_softmax(-1)
                    total += float(functional.kl_div(q, p, reduction="sum", log_target=True))
                    count += len(p)
        return total / count

    def _pieces(self, lesson: Lesson) -> Iterator[tuple[slice, Float[Tensor, "tokens words"], Int[Tensor, " tokens"]]]:
        """Places in a lesson, but for its last token, with the original's logits there and the tokens that follow."""
        device = self._student.device
        length = lesson.tokens.shape[1] - 1
        for start in range(0, length, TOKENS_PER_PIECE):
            place = slice(start, min(start + TOKENS_PER_PIECE, length))
            with torch.no_grad():
                hidden = lesson.states[:, place].to(device)
                expected = self._shell.predict(lesson.tokens[:, place], hidden)[0].float()
            yield place, expected, lesson.tokens[0, place.start + 1 : place.stop + 1].to(device)
