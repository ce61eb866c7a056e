"""The stage of a run in which a tuner works on the result of its walk."""

from dashq.calibration.shell import shell_of
from dashq.model.decoder import Model
from dashq.processes.group import here
from dashq.recipe.recipe import Recipe
from dashq.results.events import Listener, Tuning
from dashq.results.output import Output
from dashq.results.parts import layers_by_first, shared_tensors, tensors_by_first
from dashq.results.tuned import Tuned
from dashq.tuning.loop import Learner, Progress
from dashq.tuning.planned import keeps_all
from dashq.tuning.student import Student
from dashq.tuning.teacher import Teacher


def tune(recipe: Recipe, model: Model, teacher: Teacher, output: Output, listen: Listener) -> Tuned:
    """Change the result's scales, offsets and norms on disk; returns how it went.

    The recipe has a tuner, the teacher has passed all blocks, and all of them lie in the output. A tuning that was
    interrupted goes on. Every other process calls `follow`.
    """
    assert recipe.tuner
    steps = recipe.tuner.steps
    tuned, student = _learned(recipe, model, teacher, output, lambda check: listen(Tuning(check, steps)))
    output.change(student.applied)
    return tuned


def follow(recipe: Recipe, model: Model, teacher: Teacher) -> None:
    """The part of every process but the first in `tune`: its shares of the checks and of each step's samples."""
    _learned(recipe, model, teacher, None, lambda check: None)


def read_back(recipe: Recipe, model: Model, output: Output | None) -> Student:
    """The model that lies in the output of the first process, in every process, in the memory of one block."""
    layers = layers_by_first(output, recipe.serializer)
    return Student(model, recipe.serializer, layers, shared_tensors(output), learns=False)


def _learned(
    recipe: Recipe, model: Model, teacher: Teacher, output: Output | None, tell: Progress
) -> tuple[Tuned, Student]:
    """The course of the tuner, and a student with its best values, in every process; the first alone has an output."""
    assert recipe.tuner
    layers = layers_by_first(output, recipe.serializer)
    quantized = {layer.layer.name for layer in layers}
    outside = [layer.name for layer in model.all_layers() if layer.role != "linear"]
    left_out = {f"{name}.weight" for name in outside if name not in quantized}  # each reads the original's
    tensors = tensors_by_first(output, left_out)
    path = output.tuning() if output else None
    with shell_of(model, head=True) as shell:
        keeps = keeps_all(model, layers, recipe.tuner, here().count)
        student = Student(model, recipe.serializer, layers, tensors, keeps_all=keeps)
        tuned = Learner(recipe.tuner, student, shell, path).learn(*teacher.lessons(), tell)
    return tuned, student
