"""The steps of a tuner: a pass forward, the loss at the logits, a pass back; and a check on held-out text at times.

Every process goes through the same steps, with some of the samples: whoever computes one changes no number.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from dashq.calibration.shell import Shell
from dashq.processes.group import here
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
Gradients = Sequence[Float[Tensor, "..."] | None]  # of each parameter; None where nothing depended on it


def checks_of(tuner: Tuner, held_out: int) -> int:
    """The number of checks after the first, at even distances, and one at least.

    Between two of several the steps see as many tokens as are held out or more, so that checks take about a fifth of
    the time at most.
    """
    learned = tuner.epochs * tuner.samples * tuner.sequence_length
    return max(1, min(CHECKS, tuner.steps, learned // held_out))


class Learner:
    """A student on its way through a tuner's steps, which goes on from the state saved at `path` where there is one.

    Of several processes the first one alone has a path, and takes the steps.
    """

    def __init__(self, tuner: Tuner, student: Student, shell: Shell, path: Path | None) -> None:
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
        if path:
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
        state.share()
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
                self._save()
                saved_at = time.monotonic()
        listen(replace(state.checks[-1], step=state.step))
        state.take_best()
        state.step = steps
        self._save()  # whoever takes it over has nothing left to learn
        return Tuned(
            tuner=self._tuner.name,
            samples=sum(lesson.tokens.numel() for lesson in samples),
            held_out=sum(lesson.tokens.numel() for lesson in held_out),
            checks=tuple(check for check in state.checks if math.isfinite(check.divergence)),
            changed=self._changed,
            note=state.note,
        )

    def _save(self) -> None:
        if self._path:
            self._state.save(self._path)

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
        """One step; returns its mean loss.

        Each process forms the gradients of one sample at a time. The first adds them in the order of the samples, takes
        the step, and lets all have its values.
        """
        state, total = self._state, 0.0
        tokens = sum(lesson.tokens.shape[1] - 1 for lesson in batch)
        sums: Gradients = [None] * len(state.parameters)
        for start in range(0, len(batch), here().count):
            samples = batch[start : start + here().count]
            loss, gradients = self._gradients(samples[here().rank], tokens) if here().rank < len(samples) else (0.0, ())
            for own in here().of_all(loss):
                total += own
            if not math.isfinite(total):
                break
            sums = _with_gradients(sums, gradients, len(samples), self._student.device)
        if math.isfinite(total):
            if here().is_first:
                for parameter, gradient in zip(state.parameters, sums, strict=True):
                    parameter.grad = gradient
                self._tuner.step(state.optimizer, state.step / self._tuner.steps)
            state.share_parameters()
        state.step += 1
        return total

    def _gradients(self, lesson: Lesson, tokens: int) -> tuple[float, Gradients]:
        """The loss of one sample of a step, as a share of the mean over so many tokens, and its gradients."""
        for parameter in self._state.parameters:
            parameter.grad = None
        forward = self._student.forward(self._shell, lesson.tokens)
        loss, gradient = self._loss(lesson, forward.states, tokens)
        if math.isfinite(loss):
            self._student.backward(forward, gradient)
        return loss, [parameter.grad for parameter in self._state.parameters]

    def _loss(self, lesson: Lesson, states: States, count: int) -> tuple[float, States]:
        """The loss over a sample's tokens, divided by `count`, and its gradient by the student's last states.

        The gradients of norms outside the blocks are added to theirs.
        """
        gradient, total = torch.zeros_like(states), 0.0
        for place, expected, next_tokens in self._pieces(lesson):
            with torch.enable_grad():
                piece = states[..., place, :].detach().requires_grad_()
                predicted = self._shell.predict(lesson.tokens[:, place], piece, self._student.outside)[0].float()
                loss = self._tuner.loss(expected, predicted, next_tokens) / count
                # Only these: the head is as large as a block, and so would its gradient be.
                loss.backward(inputs=[piece, *self._state.parameters])
            assert piece.grad is not None
            gradient[..., place, :] = piece.grad
            total += float(loss.detach())
        return total, gradient

    @torch.no_grad()
    def _divergence(self, held_out: Sequence[Lesson]) -> float:
        """Σ p (log p - log p̂) in nats per token, of the student's p̂ from the original's p on held-out pieces.

        Each process has some of the pieces, whose sums are added in their order.
        """
        own = held_out[here().rank :: here().count]
        states = self._student.states(self._shell, [lesson.tokens for lesson in own]) if own else []
        sums = here().of_all([self._divergence_of(*pair) for pair in zip(own, states, strict=True)])
        total = 0.0
        for number in range(len(held_out)):
            total += sums[number % here().count][number // here().count]
        return total / sum(lesson.tokens.shape[1] - 1 for lesson in held_out)

    def _divergence_of(self, lesson: Lesson, states: States) -> float:
        """The sum over one piece's tokens."""
        total = 0.0
        for place, expected, _ in self._pieces(lesson):
            predicted = self._shell.predict(lesson.tokens[:, place], states[..., place, :], self._student.outside)
            q, p = predicted[0].float().log_softmax(-1), expected.log_softmax(-1)
            total += float(functional.kl_div(q, p, reduction="sum", log_target=True))
        return total

    def _pieces(self, lesson: Lesson) -> Iterator[tuple[slice, Float[Tensor, "tokens words"], Int[Tensor, " tokens"]]]:
        """Places in a lesson, but for its last token, with the original's logits there and the tokens that follow."""
        device = self._student.device
        length = lesson.tokens.shape[1] - 1
        for start in range(0, length, TOKENS_PER_PIECE):
            place = slice(start, min(start + TOKENS_PER_PIECE, length))
            with torch.no_grad():
                hidden = lesson.states[..., place, :].to(device)
                expected = self._shell.predict(lesson.tokens[:, place], hidden)[0].float()
            yield place, expected, lesson.tokens[0, place.start + 1 : place.stop + 1].to(device)


def _with_gradients(sums: Gradients, own: Gradients, processes: int, device: torch.device) -> Gradients:
    """The sums with the gradients that the first so many processes have, in their order; the first one has the sums."""
    for rank in range(processes):
        if here().is_first:
            gradients = here().receive([*own], rank, device) if rank else own
            sums = [*map(_added, sums, gradients)]
        elif here().rank == rank:
            here().send([*own], 0)
    return sums


def _added(total: Float[Tensor, "..."] | None, other: Float[Tensor, "..."] | None) -> Float[Tensor, "..."] | None:
    """The sum of two gradients, in the memory of the first one."""
    if total is None or other is None:
        return other if total is None else total
    return total.add_(other)
