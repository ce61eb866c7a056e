"""A run is refused for its model, its plan, its text or its folder before a weight is read."""

from pathlib import Path
from typing import Any

import pytest

from dashq import OutputError, PlanError, TextError
from dashq.quantizing.opening import check_start, open_model, plan_model
from pico import pico_model
from recipes import TEXT, build_recipe, small_scheme


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dashq.model.decoder.Model._read", lambda *arguments: pytest.fail("weights are read"))


def test_an_output_that_touches_the_models_files_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out").model_copy(update={"output": model / "below"})
    with pytest.raises(OutputError, match="below"):
        open_model(recipe)


def test_a_folder_for_calibration_is_apart_from_the_model_and_can_be_written_to(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", calibration=TEXT | {"keep": str(model / "kept")})
    with pytest.raises(OutputError, match=r"^the folder calibration\.keep, .*kept would touch the model"):
        open_model(recipe)
    (tmp_path / "file").touch()
    recipe = build_recipe(model, tmp_path / "out", calibration=TEXT | {"keep": str(tmp_path / "file" / "kept")})
    with pytest.raises(OutputError, match=r"^cannot write to the folder calibration\.keep, .*/kept: see .*/file$"):
        check_start(recipe, open_model(recipe))


def test_samples_that_are_longer_than_the_model_can_take_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"calibration\.sequence_length 4000 is more than the 256 positions"):
        open_model(build_recipe(model, tmp_path / "out", calibration=TEXT | {"sequence_length": 4000}))


def test_a_plan_has_every_layer_with_the_scheme_that_the_recipe_gives_it(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", overrides=[{"match": ".*down_proj", "bits": 4}])
    opened = open_model(recipe)
    plans = {plan.layer.name: plan.scheme.bits for plan in plan_model(recipe, opened)}
    assert plans.keys() == {layer.name for layer in opened.layers()}
    assert {name for name, bits in plans.items() if bits == 4} == {name for name in plans if "down_proj" in name}


def test_a_model_that_the_format_cannot_hold_is_refused_with_the_formats_that_can(tmp_path: Path) -> None:
    model = pico_model("gpt2", tmp_path / "model", n_embd=64, hidden_size=64, n_inner=96)
    recipe = build_recipe(model, tmp_path / "out", scheme=small_scheme(32, bits=4), serializer="mlx")
    with pytest.raises(PlanError, match=r"Formats that can hold it: .*\bdashq\b"):
        plan_model(recipe, open_model(recipe))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"calibration": TEXT | {"samples": 1_000_000}}, TextError, r"'pydoc' has \d+ tokens"),
        (
            {"tuner": {"name": "distill", "samples": 100_000, "sequence_length": 40}},
            TextError,
            "that calibration does not see",
        ),
    ],
)
def test_a_text_that_is_too_short_is_refused_before_the_run(
    changes: dict[str, Any], error: type[Exception], message: str, model: Path, tmp_path: Path
) -> None:
    recipe = build_recipe(model, tmp_path / "out", **changes)
    with pytest.raises(error, match=message):
        check_start(recipe, open_model(recipe))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_ours_is_refused_and_a_new_one_is_not_made(model: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out")
    opened = open_model(recipe)
    check_start(recipe, opened)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all my work")
    with pytest.raises(OutputError, match="is not the result of an earlier run"):
        check_start(recipe, opened)
