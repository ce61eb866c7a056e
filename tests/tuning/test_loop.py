"""A tuner's steps go by its samples, never end above their start, stop where numbers end, and go on after a stop."""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import Recipe, Tuner, run
from dashq.calibration.shell import Shell, shell_of
from dashq.errors import PluginError
from dashq.model.decoder import Model
from dashq.quantizing.opening import open_model
from dashq.results.tuned import Tuned, TuningCheck
from dashq.tuning import loop
from dashq.tuning.loop import Learner, checks_of
from dashq.tuning.state import TunerState
from dashq.tuning.student import Student
from dashq.tuning.teacher import Lesson
from dashq_plugins.tuners.distill import Distill
from interruptions import Interruption
from tunings import DISTILL, LOSS_FACTOR, SHORT, Descent, Foreign, Idle, quick_recipe, student_of, teacher_of

Lessons = tuple[list[Lesson], list[Lesson]]


@pytest.fixture(scope="module")
def recipe(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe with its result."""
    recipe = quick_recipe(model, tmp_path_factory.mktemp("loop") / "result", tuner=DISTILL)
    run(recipe.model_copy(update={"tuner": None}))
    return recipe


@pytest.fixture(scope="module")
def lessons(recipe: Recipe) -> Lessons:
    """Four samples of 40 tokens, and two held-out pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dashq.calibration.tokens.TUNER_HELD_OUT_TOKENS", 80)
        return teacher_of(recipe, open_model(recipe)).lessons()


class Bench:
    """Learners on a pico model's result, each with a student of its own."""

    def __init__(self, recipe: Recipe, lessons: Lessons, folder: Path, stack: ExitStack) -> None:
        self._open = stack
        self._recipe, self._lessons, self.path = recipe, lessons, folder / "state"

    def learner(self, tuner: Tuner) -> tuple[Learner, Student, Shell]:
        LOSS_FACTOR[0] = 1.0
        model, student = student_of(self._recipe, self._recipe.output)
        self._model: Model = model
        shell = self._open.enter_context(shell_of(model, head=True))
        return Learner(tuner, student, shell, self.path), student, shell

    def learn(self, tuner: Tuner, listen: Any = lambda check: None) -> tuple[Tuned, Student]:
        learner, student, _ = self.learner(tuner)
        return learner.learn(*self._lessons, listen), student


@pytest.fixture
def bench(recipe: Recipe, lessons: Lessons, tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(recipe, lessons, tmp_path, stack)


@pytest.mark.parametrize(
    ("fields", "held_out", "expected"),
    [
        ({"samples": 120, "sequence_length": 512}, 2048, 10),
        ({"samples": 40, "sequence_length": 256}, 2048, 5),
        ({"samples": 2, "sequence_length": 512, "epochs": 3}, 512, 6),
        ({"samples": 12, "sequence_length": 512, "batch": 4}, 512, 3),
        ({"samples": 2, "sequence_length": 40}, 2048, 1),
    ],
)
def test_between_two_checks_at_least_as_many_tokens_are_learned_as_are_held_out(
    fields: dict[str, Any], held_out: int, expected: int
) -> None:
    assert checks_of(Distill(**fields), held_out) == expected


def changes(student: Student) -> list[torch.Tensor]:
    return [tunable.parameter.detach() for tunable in student.tunables]


def test_the_divergence_is_lowered_and_the_result_is_its_best_state(bench: Bench) -> None:
    tuned, student = bench.learn(Distill(**SHORT, epochs=2))
    assert tuned.best.divergence < 0.99 * tuned.before
    assert [check.step for check in tuned.checks] == [0, 2, 4, 6, 8]  # after as many tokens as are held out
    assert tuned.checks[0].loss is None
    assert all(check.loss is not None and check.loss > 0 for check in tuned.checks[1:])
    assert (tuned.tuner, tuned.samples, tuned.held_out, tuned.note) == ("distill", 160, 80, "")
    learner, again, _ = bench.learner(Distill(**SHORT, epochs=2))
    for own, other in zip(changes(student), changes(again), strict=True):
        assert own.equal(other)  # as the file has them
    assert learner._divergence(bench._lessons[1]) == tuned.best.divergence


def test_a_tuner_that_makes_it_worse_leaves_all_as_it_was(bench: Bench) -> None:
    tuned, student = bench.learn(Distill(**SHORT, scales=0.5, offsets=0.5, norms=0.5))
    assert tuned.checks[-1].divergence > tuned.before
    assert tuned.best == tuned.checks[0]
    assert not any(change.any() for change in changes(student))


def test_a_rate_of_0_changes_nothing(bench: Bench) -> None:
    tuned, student = bench.learn(Descent(**SHORT, rate=0.0))
    assert {check.divergence for check in tuned.checks} == {tuned.before}
    assert not any(change.any() for change in changes(student))


def test_one_seed_is_one_result_and_another_seed_another_order(bench: Bench) -> None:
    def of_seed(seed: int) -> list[torch.Tensor]:
        bench.path.unlink(missing_ok=True)
        return changes(bench.learn(Distill(**SHORT, seed=seed))[1])

    first, again, other = of_seed(0), of_seed(0), of_seed(3)
    assert all(x.equal(y) for x, y in zip(first, again, strict=True))
    assert not all(x.equal(y) for x, y in zip(first, other, strict=True))


def test_every_epoch_takes_each_sample_once_in_another_order(bench: Bench) -> None:
    learner, *_ = bench.learner(Descent(**SHORT, epochs=6, batch=3))
    samples = bench._lessons[0]
    numbers: list[list[int]] = []
    for batch in learner._batches(samples):
        numbers.append([next(index for index, own in enumerate(samples) if own is lesson) for lesson in batch])
        learner._state.step += 1
    assert [len(batch) for batch in numbers] == [3, 1] * 6
    epochs = [[*numbers[index], *numbers[index + 1]] for index in range(0, 12, 2)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_gradient_is_that_of_the_mean_loss_whatever_the_batch_and_pieces(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(batch: list[Lesson]) -> list[torch.Tensor]:
        learner, student, _ = bench.learner(Descent(**SHORT, rate=0.0))
        learner._step(batch)
        return [tunable.parameter.grad for tunable in student.tunables if tunable.parameter.grad is not None]

    samples = bench._lessons[0]
    together, *singly = gradients(samples[:2]), gradients(samples[:1]), gradients(samples[1:2])
    monkeypatch.setattr(loop, "TOKENS_PER_PIECE", 7)
    in_pieces = gradients(samples[:2])
    assert len(together) == len(bench.learner(Descent(**SHORT))[1].tunables)
    for whole, one, other, piecewise in zip(together, *singly, in_pieces, strict=True):
        size = float(whole.abs().max())
        torch.testing.assert_close((one + other) / 2, whole, rtol=1e-3, atol=1e-4 * size)
        torch.testing.assert_close(piecewise, whole, rtol=1e-3, atol=1e-4 * size)


def test_gradients_of_a_steps_samples_are_formed_apart_and_added_in_their_order(bench: Bench) -> None:
    learner, student, _ = bench.learner(Descent(**SHORT, rate=0.0))
    batch = bench._lessons[0][:3]
    tokens = sum(lesson.tokens.shape[1] - 1 for lesson in batch)
    apart = [learner._gradients(lesson, tokens) for lesson in batch]
    assert learner._step(batch) == apart[0][0] + apart[1][0] + apart[2][0]
    for tunable, *own in zip(student.tunables, *(gradients for _, gradients in apart), strict=True):
        assert tunable.parameter.grad is not None
        assert tunable.parameter.grad.equal(own[0] + own[1] + own[2])


def test_a_check_is_of_each_piece_by_itself(bench: Bench) -> None:
    learner, *_ = bench.learner(Descent(**SHORT))
    pieces = bench._lessons[1]
    assert len(pieces) == 2
    singly = [learner._divergence([piece]) for piece in pieces]
    assert learner._divergence(pieces) == pytest.approx(sum(singly) / 2, rel=1e-12)


def test_gradients_reach_nothing_of_the_model_itself(bench: Bench) -> None:
    bench.learn(Descent(**SHORT))
    assert all(parameter.grad is None for parameter in bench._model.network.parameters())


def test_a_loss_that_is_no_number_stops_it_and_the_best_is_kept(bench: Bench) -> None:
    heard: list[TuningCheck] = []
    tuned, student = bench.learn(Descent(**SHORT, epochs=5, rate=1e-3, broken_at=0.3), heard.append)
    assert tuned.note == "it stopped at step 8 of 20, where predictions are no numbers"
    assert tuned.checks[-1].step == 6
    assert all(math.isfinite(check.divergence) for check in tuned.checks)
    assert tuned.best.divergence <= tuned.before
    assert all(change.isfinite().all() for change in changes(student))
    assert heard[-1].step == 8
    again, same = bench.learn(Descent(**SHORT, epochs=5, rate=1e-3, broken_at=0.3))
    assert again == tuned  # whoever goes on from there has nothing left to learn
    assert all(x.equal(y) for x, y in zip(changes(student), changes(same), strict=True))


def test_parameters_that_become_no_numbers_stop_it(bench: Bench) -> None:
    tuned, student = bench.learn(Descent(**SHORT, rate=1e30, epochs=3))
    assert "where predictions are no numbers" in tuned.note
    assert tuned.best == tuned.checks[0]
    assert not any(change.any() for change in changes(student))


def test_a_start_without_numbers_is_left_as_it_is(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Learner, "_divergence", lambda self, held_out: float("nan"))
    tuned, student = bench.learn(Descent(**SHORT))
    assert not any(change.any() for change in changes(student))
    assert tuned.checks == ()
    assert str(tuned) == "not tuned: it stopped at step 1 of 4, where predictions are no numbers"


@pytest.mark.parametrize("tuner", [Idle(**SHORT), Foreign(**SHORT)], ids=["nothing", "something else"])
def test_a_tuner_that_changes_nothing_or_something_else_is_refused_by_name(bench: Bench, tuner: Tuner) -> None:
    with pytest.raises(PluginError, match=f"^tuner '{tuner.name}'"):
        bench.learn(tuner)


@pytest.mark.parametrize("step", [0, 1, 3, 4])
def test_a_stop_at_any_step_changes_nothing_at_the_end(
    bench: Bench, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = Distill(**SHORT)
    whole, student = bench.learn(tuner)
    bench.path.unlink()
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)

    def stop(check: TuningCheck) -> None:
        if check.step == step:
            raise Interruption

    with pytest.raises(Interruption):
        bench.learn(tuner, stop)
    tuned, again = bench.learn(tuner)
    assert tuned == whole
    assert all(x.equal(y) for x, y in zip(changes(student), changes(again), strict=True))


@pytest.mark.parametrize("saves", [1, 2, 4, 5])
def test_a_stop_at_any_save_changes_nothing_at_the_end(
    bench: Bench, saves: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = Distill(**SHORT)
    whole, student = bench.learn(tuner)
    bench.path.unlink()
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    save, count = TunerState.save, [0]

    def failing(state: TunerState, path: Path) -> None:
        count[0] += 1
        if count[0] == saves:
            raise Interruption
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(TunerState, "save", failing)
        with pytest.raises(Interruption):
            bench.learn(tuner)
    tuned, again = bench.learn(tuner)
    assert tuned == whole
    assert all(x.equal(y) for x, y in zip(changes(student), changes(again), strict=True))


def test_what_is_heard_goes_from_the_first_step_to_the_last(bench: Bench) -> None:
    heard: list[TuningCheck] = []
    tuned, _ = bench.learn(Distill(**SHORT, epochs=2), heard.append)
    assert [check.step for check in heard] == list(range(9))
    assert heard[0].divergence == tuned.before
    assert heard[-1].divergence == tuned.checks[-1].divergence
