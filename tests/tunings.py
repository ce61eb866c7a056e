"""Tuners, students and lessons for tests."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dashq import Recipe, Registry, Tunable, Tuner, hookimpl, load_registry
from dashq.calibration.tokens import draw_for, draw_to_tune
from dashq.model.decoder import Model
from dashq.quantizing.opening import open_model
from dashq.results.checkpoint import open_checkpoint
from dashq.tuning.student import Student
from dashq.tuning.teacher import Teacher
from recipes import REGISTRY, build_recipe, small_scheme

SHORT: dict[str, Any] = {"samples": 4, "sequence_length": 40}
DISTILL = {"name": "distill", **SHORT}


class Descent(Tuner):
    """Plain descent with momentum on the mean squared difference of logits, at a `rate`; NaN from `broken_at` on."""

    name = "descent"
    rate: float = 0.01
    broken_at: float = 2.0

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        return torch.optim.SGD([tunable.parameter for tunable in tunables], lr=self.rate, momentum=0.5)

    def loss(self, original: Tensor, quantized: Tensor, next_tokens: Tensor) -> Tensor:
        return (quantized - original).square().mean(-1).sum() * LOSS_FACTOR[0]

    def step(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        super().step(optimizer, progress)
        LOSS_FACTOR[0] = float("nan") if progress + 1e-9 >= self.broken_at else 1.0


LOSS_FACTOR = [1.0]  # of the losses after the latest step


class Idle(Descent):
    """A tuner that gives its optimizer nothing."""

    name = "idle"

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": []}], lr=0.1)


class Foreign(Descent):
    """A tuner that changes something of its own beside the tunables."""

    name = "foreign"

    def optimizer(self, tunables: Sequence[Tunable]) -> torch.optim.Optimizer:
        own = torch.nn.Parameter(torch.zeros(1))
        return torch.optim.SGD([tunables[0].parameter, own], lr=0.1)


TUNERS = load_registry(SimpleNamespace(dashq_tuners=hookimpl(lambda: [Descent, Idle, Foreign])))


def quick_recipe(model: Path, output: Path, registry: Registry = REGISTRY, **changes: Any) -> Recipe:
    """A recipe that rounds to the nearest, in float32, with changes."""
    return build_recipe(
        model, output, registry, **{"scheme": small_scheme(solver="rtn"), "dtype": "float32", **changes}
    )


def student_of(recipe: Recipe, folder: Path) -> tuple[Model, Student]:
    """The recipe's model, each of its blocks read once, and the result in a folder as its student."""
    model, source = open_model(recipe), open_checkpoint(folder)
    for _ in model.walk():  # buffers stay
        pass
    return model, Student(model, source.serializer, source.layers.values(), source.tensors)


def teacher_of(recipe: Recipe, model: Model) -> Teacher:
    """The model on the text of the recipe's tuner, behind all blocks."""
    assert recipe.tuner
    teacher = Teacher(model, draw_to_tune(model, recipe, recipe.tuner, draw_for(model, recipe.calibration)))
    with torch.no_grad():
        for block in model.walk():
            teacher.pass_original(block)
    return teacher


def change(student: Student, size: float) -> None:
    """Give all changes random values."""
    generator = torch.Generator().manual_seed(1)
    for tunable in student.tunables:
        tunable.parameter.data = size * torch.randn(tunable.parameter.shape, generator=generator)
