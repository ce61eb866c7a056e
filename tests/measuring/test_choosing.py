"""Critical layers and bits within a budget: measured, chosen, and then a recipe like any other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from choices import plans_of
from dashq import OutputError, PlanError, load_recipe, run
from dashq.measuring.analysis import Analysis
from dashq.measuring.choosing import choices_for, settle, stored
from dashq.measuring.sensitivity import analyze
from dashq.model.decoder import Model
from dashq.quantizing.opening import open_model
from dashq.results.events import BlockDone, Event, Measuring
from dashq.results.fingerprint import inputs_of
from dashq.results.report import read_report
from pico import WIDE, pico_model
from recipes import REGISTRY, TEXT, build_recipe, small_recipe, small_scheme

GROUPERS = [{"name": "contiguous", "size": size} for size in (8, 16)]
DOWN = {"match": ".*down_proj", "bits": 4}


def test_overrides_for_weights_that_are_not_understood_last_until_the_choice(
    model: Path, analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "unclear_weights", lambda self: {"model.layers.0.odd": "a stack of unknown form"})
    kept = {"match": r"model\.layers\.0\.odd", "skip": True}
    recipe = build_recipe(model, tmp_path / "out", overrides=[kept], budget=5)
    opened = open_model(recipe)
    choices_for(recipe, opened)
    result, _ = settle(recipe, opened, analysis.model_copy(update={"asked": {}}))
    assert not result.measures


def test_layers_that_runtimes_fuse_are_chosen_together(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", **WIDE)
    scheme = small_recipe(model, tmp_path)["scheme"]
    fields = scheme | {"grouper": {"name": "contiguous", "size": 64}, "bits": 4, "solver": "rtn"}
    overrides = [{"critical": {"share": 0.3}, "solver": "irls"}]
    recipe = build_recipe(model, tmp_path / "out", scheme=fields, serializer="gptq", overrides=overrides, budget=3)
    opened = open_model(recipe)
    result, _ = settle(recipe, opened, analyze(recipe, opened, choices_for(recipe, opened)))
    schemes = {name: (plan.scheme.bits, plan.scheme.solver.name) for name, plan in plans_of(result).items()}
    assert len({bits for bits, _ in schemes.values()}) > 1
    for block in range(2):
        prefix = f"model.layers.{block}"
        assert len({schemes[f"{prefix}.self_attn.{name}_proj"] for name in "qkv"}) == 1
        assert schemes[f"{prefix}.mlp.gate_proj"] == schemes[f"{prefix}.mlp.up_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"budget": 2.5},
            r"budget\.bits_per_weight: 2\.5 cannot be met: the least possible is 4, with 2 bits in groups of 16\. A "
            r"larger number is possible, or fewer budget\.bits, or larger groups in budget\.groupers",
        ),
        (
            {"budget": 4.1, "overrides": [{"critical": {"share": 0.3}, "bits": 8}]},
            r"budget\.bits_per_weight: 4\.1 cannot be met beside override 1, whose critical layers have 8 bits",
        ),
        (
            {"budget": 5, "overrides": [{"match": ".*", "bits": 8}]},
            r"the least possible is 10, with what overrides decide",
        ),
        (
            {"budget": {"bits_per_weight": 5, "groupers": {"name": "contiguous", "size": 32}}},
            r"q_proj: nothing that the budget offers is possible: group size 32 does not divide 48",
        ),
        ({"overrides": [{"match": "typo", "critical": {"share": 0.1}}]}, r"override 1 \('typo'\) matches no layer"),
        (
            {"overrides": [{"critical": {"share": 0.1}, "solver": "feedback"}]},
            r"override 1, for layers that are found critical: .*solver 'feedback' needs Coupled curvature",
        ),
        (
            {"overrides": [DOWN | {"skip": True}, {"match": ".*down_proj", "critical": {"share": 0.1}, "bits": 4}]},
            r"override 2: no layer is left to choose critical ones from",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashq.model.decoder.Model._read", lambda *arguments: pytest.fail("weights are read"))
    with pytest.raises(PlanError, match=message):
        run(build_recipe(model, tmp_path / "out", **changes))


def test_a_folder_that_must_not_be_replaced_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(build_recipe(model, tmp_path / "out"))
    monkeypatch.setattr("dashq.model.decoder.Model._read", lambda *arguments: pytest.fail("weights are read"))
    with pytest.raises(OutputError, match="already holds a finished result"):
        run(build_recipe(model, tmp_path / "out", budget=5))


def test_a_users_file_with_the_name_of_some_formats_is_refused_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "analysis.json").write_text('{"versions": {"dashq": "0"}}')
    (tmp_path / "out" / "model.gguf").write_text("a user's own")
    monkeypatch.setattr("dashq.model.decoder.Model._read", lambda *arguments: pytest.fail("weights are read"))
    with pytest.raises(OutputError, match=r"no run wrote model\.gguf"):
        run(build_recipe(model, tmp_path / "out", budget=5))


MEASURED: dict[str, Any] = {"overrides": [{"critical": {"share": 0.1}, "solver": "closed_form"}], "budget": 4.6}


@pytest.fixture(scope="module")
def heard() -> list[Event]:
    """All that the run of `measured` tells."""
    return []


@pytest.fixture(scope="module")
def measured(model: Path, heard: list[Event], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result whose run measured, which no test may change."""
    return run(build_recipe(model, tmp_path_factory.mktemp("measured") / "out", **MEASURED), heard.append)


def test_a_run_measures_chooses_and_tells(measured: Path, heard: list[Event]) -> None:
    report = json.loads((measured / "report.json").read_text())
    assert any(isinstance(event, Measuring) for event in heard)
    assert report["seconds"]["measure"] > 0
    assert report["totals"]["bits_per_weight"] <= 4.6
    solvers = {layer["name"]: layer["solver"] for layer in report["layers"]}
    critical, *budgets = report["chosen"]
    assert {name for name, solver in solvers.items() if solver == "closed_form"} == set(critical["layers"])
    bits = {layer["name"]: layer["bits"] for layer in report["layers"]}
    for chosen in budgets:
        assert {f"budget: {bits[name]} bits in groups of 16" for name in chosen["layers"]} == {chosen["what"]}
    assert sorted(name for chosen in budgets for name in chosen["layers"]) == sorted(bits)


def test_what_lies_beside_the_result_makes_it_again_without_measuring(measured: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((measured / "recipe.yaml").read_text())
    assert recipe["budget"] is None
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe | {"output": str(tmp_path / "again")}))
    heard: list[Event] = []
    result = run(load_recipe(again, REGISTRY), heard.append)
    assert not any(isinstance(event, Measuring) for event in heard)
    one, other = (load_file(folder / "model.safetensors") for folder in (measured, result))
    assert one.keys() == other.keys()
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_a_measurement_that_is_read_from_disk_is_no_phase_of_the_run(
    model: Path, measured: Path, tmp_path: Path
) -> None:
    shutil.copytree(measured, tmp_path / "out")
    first = read_report(measured)
    again = read_report(run(build_recipe(model, tmp_path / "out", **MEASURED), overwrite=True))
    assert "measure" in first.seconds
    assert "measure" not in again.seconds
    assert again.chosen == first.chosen


def test_an_interrupted_run_goes_on_with_what_it_had_measured(model: Path, measured: Path, tmp_path: Path) -> None:
    recipe = build_recipe(model, tmp_path / "out", **MEASURED)

    def interrupt(event: Event) -> None:
        if isinstance(event, BlockDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, interrupt)
    analysis = (tmp_path / "out" / "analysis.json").read_text()
    heard: list[Event] = []
    run(recipe, heard.append)
    assert not any(isinstance(event, Measuring) for event in heard)
    assert (tmp_path / "out" / "analysis.json").read_text() == analysis
    one, other = (load_file(folder / "model.safetensors") for folder in (measured, tmp_path / "out"))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_a_measurement_answers_for_other_budgets_and_shares_and_for_nothing_else(
    model: Path, measured: Path, tmp_path: Path
) -> None:
    def is_stored(**changes: Any) -> bool:
        recipe = build_recipe(model, tmp_path / "out", **changes)
        opened = open_model(recipe)
        return stored(recipe, choices_for(recipe, opened), inputs_of(opened, recipe)) is not None

    assert not is_stored(**MEASURED)
    shutil.copytree(measured, tmp_path / "out")
    assert is_stored(**MEASURED)
    assert is_stored(**MEASURED | {"budget": 5, "certificate_groups": 8})
    assert is_stored(overrides=[{"critical": {"share": 0.4, "by": "error"}, "bits": 4}])
    assert not is_stored(budget={"bits_per_weight": 5, "bits": [2, 8]})
    assert not is_stored(**MEASURED, scheme=small_scheme(solver="rtn"))
    assert not is_stored(**MEASURED, calibration=TEXT | {"samples": 2})
    (tmp_path / "out" / "analysis.json").write_text("{}")
    assert not is_stored(**MEASURED)
