"""A run ends with a sentence: what the original and its result make of one prompt."""

from pathlib import Path

import pytest

from dashq import CheckpointError, run
from dashq.measuring.continuation import PROMPT, continuation, whole_bytes
from dashq.measuring.evaluate import continue_text, load_model
from dashq.quantizing.opening import open_model
from dashq.results.checkpoint import open_checkpoint
from dashq.results.judged import Continuation
from dashq.results.report import read_report
from family_results import FamilyResults
from pico import EVEN, pico_model
from recipes import build_recipe, small_scheme
from tunings import DISTILL

pytestmark = pytest.mark.usefixtures("sentences")


def as_opened(model: Path, result: Path) -> Continuation:
    texts = [continue_text(load_model(str(folder), dtype="float32"), PROMPT).text for folder in (model, result)]
    return Continuation(PROMPT, *texts)


@pytest.mark.parametrize("family", ["mixtral", "bamba"])
def test_the_sentence_is_that_of_the_opened_models(family: str, families: FamilyResults, tmp_path: Path) -> None:
    model = families.model(family)
    if family == "mixtral":
        result = families.result(family)
    else:
        result = run(build_recipe(model, tmp_path / "out", dtype="float32"))
    judgement = read_report(result).judgement
    assert judgement
    assert judgement.continuation == as_opened(model, result)


def test_of_a_tuned_result_it_is_with_what_the_tuner_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashq.calibration.tokens.TUNER_HELD_OUT_TOKENS", 80)
    model = pico_model("llama", tmp_path / "model", **EVEN)
    recipe = build_recipe(
        model, tmp_path / "out", dtype="float32", scheme=small_scheme(32, bits=2, solver="rtn"), tuner=DISTILL
    )
    result = run(recipe)
    report = read_report(result)
    assert report.tuned
    assert report.tuned.best.step > 0
    assert report.judgement
    assert report.judgement.continuation == as_opened(model, result)


def test_a_model_that_is_too_large_or_cannot_generate_has_none(
    model: Path, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, source = open_model(build_recipe(model, tmp_path / "out")), open_checkpoint(result)

    def fail(*arguments: object) -> None:
        raise CheckpointError("it cannot continue a text")

    with monkeypatch.context() as changes:
        changes.setattr("dashq.measuring.continuation.continue_text", fail)
        assert continuation(opened, source.serializer, source.layers, source.tensors) is None
    assert all(parameter.is_meta for parameter in opened.network.parameters())
    monkeypatch.setattr("dashq.measuring.continuation.LARGEST", whole_bytes(opened) - 1)
    monkeypatch.setattr("dashq.model.decoder.Model.outside", fail)
    assert continuation(opened, source.serializer, source.layers, source.tensors) is None


@pytest.mark.parametrize(("dtype", "bytes_of_a_weight"), [("float32", 4), ("bfloat16", 4 + 2)])
def test_bytes_of_a_model_are_those_of_its_weights_where_it_computes_and_of_its_files_where_they_differ(
    dtype: str, bytes_of_a_weight: int, model: Path, tmp_path: Path
) -> None:
    opened = open_model(build_recipe(model, tmp_path / "out", dtype=dtype))
    numbers = sum(parameter.numel() for parameter in load_model(str(model)).network.parameters())
    assert whole_bytes(opened) == bytes_of_a_weight * numbers
