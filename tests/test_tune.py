"""A finished result learns from the model that it was made from, in its place or beside it, and again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dashq import Recipe, TextError, Tuner, run
from dashq.errors import CheckpointError, OutputError
from dashq.results.events import Event, Tuning
from dashq.results.report import read_report
from dashq.results.verify import verify
from dashq.tune import recipe_to_tune, tune_result
from dashq.tuning import loop
from dashq_plugins.tuners.distill import Distill
from interruptions import Interruption, contents, weights
from pico import EVEN, pico_model
from recipes import build_recipe, small_scheme
from spread import run_together
from tunings import DISTILL, SHORT


@pytest.fixture(autouse=True)
def _short_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashq.calibration.tokens.TUNER_HELD_OUT_TOKENS", 80)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result in float16, which no test may change."""
    folder = tmp_path_factory.mktemp("made")
    model = pico_model("llama", folder / "model", torch.float16, **EVEN)
    return run(build_recipe(model, folder / "result", dtype="float32", scheme=small_scheme(32, solver="rtn")))


def beside(result: Path, output: Path, tuner: Tuner | None = None) -> Recipe:
    """The recipe to tune a result into another folder."""
    return recipe_to_tune(result, tuner or Distill(**SHORT)).model_copy(update={"output": output})


@pytest.mark.usefixtures("sentences")
def test_it_becomes_what_a_run_with_the_tuner_makes(made: Path, tmp_path: Path) -> None:
    before = contents(made)
    tuned = tune_result(made, beside(made, tmp_path / "tuned"))
    assert contents(made) == before
    model = made.parent / "model"
    recipe = build_recipe(
        model, tmp_path / "run", dtype="float32", scheme=small_scheme(32, solver="rtn"), tuner=DISTILL
    )
    at_once = run(recipe)
    one, other = load_file(tuned / "model.safetensors"), load_file(at_once / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())
    assert read_report(tuned).tuned == read_report(at_once).tuned
    assert read_report(tuned).judgement == read_report(at_once).judgement
    assert all(check.passed for check in verify(tuned))


def test_a_second_tuning_begins_where_the_first_ended(made: Path, tmp_path: Path) -> None:
    first = tune_result(made, beside(made, tmp_path / "first"))
    second = tune_result(first, beside(first, tmp_path / "second", Distill(**SHORT, epochs=2)))
    one, other = read_report(first).tuned, read_report(second).tuned
    assert one
    assert other
    assert other.before == pytest.approx(one.best.divergence, rel=1e-6)
    assert other.best.divergence < one.best.divergence
    assert all(check.passed for check in verify(second))


def test_it_is_replaced_in_its_place_only_when_asked(made: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(made, tmp_path / "result"))
    recipe = recipe_to_tune(place, Distill(**SHORT))
    assert recipe.output == place
    before = contents(place)
    with pytest.raises(OutputError, match="already holds a finished result"):
        tune_result(place, recipe)
    assert contents(place) == before
    tune_result(place, recipe, overwrite=True)
    assert read_report(place).tuned
    assert contents(place).keys() == before.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("step", [0, 2, 4])
def test_stopped_in_its_place_it_is_whole_and_goes_on(
    step: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    whole = tune_result(made, beside(made, tmp_path / "whole"))
    place = Path(shutil.copytree(made, tmp_path / "result"))
    before = contents(place)

    def listen(event: Event) -> None:
        if isinstance(event, Tuning) and event.check.step == step:
            raise Interruption

    recipe = recipe_to_tune(place, Distill(**SHORT))
    with pytest.raises(Interruption):
        tune_result(place, recipe, listen, overwrite=True)
    assert contents(place) == before
    heard: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, Tuning):
            heard.append(event.check.step)

    tune_result(place, recipe, note, overwrite=True)
    assert heard[0] == step
    assert weights(place) == weights(whole)
    assert read_report(place).tuned == read_report(whole).tuned


def test_several_processes_tune_a_result_to_the_same_bytes_as_one(made: Path, tmp_path: Path) -> None:
    """Of four processes, one has no sample of some steps; two go on below."""
    tuner = "{name: distill, samples: 5, sequence_length: 40, batch: 3}"
    for processes in (1, 4):
        command = ["-m", "dashq", "tune", str(made), "--tuner", tuner, "--output", str(tmp_path / str(processes))]
        outcomes = run_together([command] * processes)
        assert [outcome.code for outcome in outcomes] == [0] * processes, outcomes
        assert not any(outcome.output for outcome in outcomes[1:])
    one, several = tmp_path / "1", tmp_path / "4"
    assert weights(several) == weights(one)
    assert read_report(several).tuned == read_report(one).tuned
    assert read_report(several).judgement == read_report(one).judgement


def test_a_tuning_that_was_stopped_goes_on_in_several_processes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # other processes check on as much text as ever
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    torch.set_num_threads(1)
    place = Path(shutil.copytree(made, tmp_path / "result"))

    def listen(event: Event) -> None:
        if isinstance(event, Tuning) and event.check.step == 2:
            raise Interruption

    with pytest.raises(Interruption):
        tune_result(place, recipe_to_tune(place, Distill(**SHORT)), listen, overwrite=True)
    command = ["-m", "dashq", "tune", str(place), "--tuner", "{name: distill, samples: 4, sequence_length: 40}"]
    outcomes = run_together([[*command, "--log-json"]] * 2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    events = [json.loads(line) for line in outcomes[0].output.splitlines()]
    assert [event["check"]["step"] for event in events if event["event"] == "Tuning"] == [2, 3, 4]
    assert weights(place) == weights(tune_result(made, beside(made, tmp_path / "whole")))


def test_processes_with_another_tuner_are_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    command = ["-m", "dashq", "tune", str(made), "--output", str(tmp_path / "out"), "--tuner"]
    tuners = [f"{{name: distill, samples: {samples}, sequence_length: 40}}" for samples in (4, 5)]
    outcomes = run_together([[*command, tuner] for tuner in tuners])
    assert [outcome.code for outcome in outcomes] == [2, 2]
    said = "".join(outcome.errors for outcome in outcomes)
    assert re.fullmatch(r"dashq: .*process 1 of 2 would not do the same: .*\n", said), said
    assert not (tmp_path / "out").exists()


COMPRESSED = {"name": "compressed-tensors", "zero": "integer"}


# Some of these call their codes as the model calls its weights.
@pytest.mark.parametrize(
    ("serializer", "bits"), [("mlx", 3), (COMPRESSED, 4), ("gguf", 5)], ids=["mlx", "whole", "gguf"]
)
def test_results_of_other_formats_are_tuned(serializer: Any, bits: int, made: Path, tmp_path: Path) -> None:
    scheme = small_scheme(32, bits=bits, solver="rtn")
    recipe = build_recipe(made.parent / "model", tmp_path / "result", scheme=scheme, serializer=serializer)
    result = run(recipe)
    tuned = tune_result(result, beside(result, tmp_path / "tuned"))
    report = read_report(tuned).tuned
    assert report
    assert report.best.divergence < report.before
    assert all(check.passed for check in verify(tuned))
    assert contents(tuned).keys() == contents(result).keys()


def test_a_model_of_other_layers_is_refused_with_both_shapes(made: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = EVEN | {"intermediate_size": 64}
    other = pico_model("llama", tmp_path / "other", torch.float16, **sizes)
    recipe = beside(made, tmp_path / "tuned").model_copy(update={"model": str(other)})
    with pytest.raises(CheckpointError, match=r"was not made from .*other: it holds \S+ as \[96, 64\], .* as \[64, 64"):
        tune_result(made, recipe)
    assert not (tmp_path / "tuned").exists()


def test_a_folder_that_is_no_result_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no finished result of dashq"):
        recipe_to_tune(made.parent / "model", Distill(**SHORT))


def test_too_little_text_is_refused_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 40)
    tuner = Distill.model_validate({"dataset": str(text), "samples": 400, "sequence_length": 40})
    with pytest.raises(TextError, match="its share is 400 samples"):
        tune_result(made, beside(made, tmp_path / "tuned", tuner))
    assert not (tmp_path / "tuned").exists()
