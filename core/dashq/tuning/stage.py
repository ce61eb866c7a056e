"""The stage of a run in which a tuner works on the result of its walk."""

from dashq.calibration.shell import shell_of
from dashq.model.decoder import Model
from dashq.recipe.recipe import Recipe
from dashq.results.events import Listener, Tuning
from dashq.results.output import Output
from dashq.results.tuned import Tuned, TuningCheck
from dashq.tuning.loop import Learner
from dashq.tuning.planned import keeps_all
from dashq.tuning.student import Student
from dashq.tuning.teacher import Teacher


def tune(recipe: Recipe, model: Model, teacher: Teacher, output: Output, listen: Listener) -> tuple[Tuned, Student]:
    """Change the result's scales, offsets and norms on disk; returns how it went, and the model as it is now.

    The recipe has a tuner, the teacher has passed all blocks, and all of them lie in the output. A tuning that was
    interrupted goes on.
    """
    tuner, layers = recipe.tuner, list(output.stored_layers().values())
    assert tuner

    def tell(check: TuningCheck) -> None:
        listen(Tuning(check, tuner.steps))

    with shell_of(model, head=True) as shell:
        keeps = keeps_all(model, layers, tuner)
        student = Student(model, recipe.serializer, layers, output.tensors(), keeps_all=keeps)
        learner = Learner(tuner, student, shell, output.tuning())
        tuned = learner.learn(*teacher.lessons(), tell)
    output.change(student.applied)
    return tuned, Student(model, recipe.serializer, layers, output.tensors(), learns=False)
