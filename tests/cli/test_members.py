"""Members that are finished are not run again, one at a time is run by a process, and a failure stops no other."""

import json
import os
from pathlib import Path

import pytest

from commands import Outcome, call
from dashq.errors import OutputError
from dashq.measuring.sensitivity import analyze
from dashq.pipeline import run
from dashq.recipe.recipe import Recipe
from dashq.results.events import BlockDone
from dashq.results.lock import locked
from dashq_cli import members
from dashq_cli.progress import JsonLog
from sweeps import VARIED, recipe_in


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    recipe = recipe_in(tmp_path_factory.mktemp("sweep"), model)
    return recipe, call("sweep", recipe, *VARIED)


def test_finished_members_are_not_run_again(swept: tuple[Path, Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = swept
    monkeypatch.setattr(members, "run", lambda *arguments: pytest.fail("run again"))
    again = call("sweep", recipe, *VARIED)
    assert (again.code, again.errors) == (0, "")
    assert again.output.count("finished") == 4


def test_a_member_of_another_process_comes_last(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_in(tmp_path, model)
    first = tmp_path / "out-sweep" / "bits-2"
    first.mkdir(parents=True)
    held = locked(first)
    held.__enter__()
    waits: list[float] = []

    def end_of_the_other_process(seconds: float) -> None:
        waits.append(seconds)
        held.__exit__(None, None, None)

    monkeypatch.setattr("dashq_cli.members.time.sleep", end_of_the_other_process)
    outcome = call("sweep", recipe, "--vary", "scheme.bits=2,3")
    assert (outcome.code, outcome.errors) == (0, "")
    assert f"another run writes into {first}: process {os.getpid()}" in outcome.output.replace("\n", "")
    assert len(waits) == 1
    rows = json.loads((tmp_path / "out-sweep" / "sweep.json").read_text())["members"]
    assert [row["member"] for row in rows] == ["bits-2", "bits-3"]


def test_an_interrupted_sweep_says_what_is_kept_and_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in(tmp_path, model)
    blocks: list[object] = []

    def interrupt(log: JsonLog, event: object) -> None:
        if isinstance(event, BlockDone):
            blocks.append(event)
        if len(blocks) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(JsonLog, "hear", interrupt)
        outcome = call("sweep", recipe, "--vary", "scheme.bits=2,3", "--log-json")
    assert outcome.code == 130
    assert f"interrupted; 1 of 2 members are finished and kept in {tmp_path / 'out-sweep'}" in outcome.errors
    resumed = call("sweep", recipe, "--vary", "scheme.bits=2,3", "--log-json")
    assert resumed.code == 0
    assert resumed.output.count('"LayerDone"') == 14  # of two blocks: one is on disk


def test_a_member_that_fails_is_named_and_the_others_are_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(recipe: Recipe, *arguments: object) -> Path:
        if recipe.scheme.bits == 2:
            raise OutputError("the disk is full")
        return run(recipe)

    monkeypatch.setattr(members, "run", failing)
    outcome = call("sweep", recipe_in(tmp_path, model), "--vary", "scheme.bits=2,3", "-q")
    assert (outcome.code, outcome.errors) == (2, "dashq: scheme.bits=2: the disk is full\n")
    rows = json.loads((tmp_path / "out-sweep" / "sweep.json").read_text())["members"]
    assert [row["member"] for row in rows] == ["bits-3"]


def test_members_with_a_budget_share_one_measurement(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []

    def counted(*arguments: object, **options: object) -> object:
        measured.append(arguments)
        return analyze(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("dashq.measuring.choosing.analyze", counted)
    outcome = call("sweep", recipe_in(tmp_path, model), "--vary", "budget=4.5,5")
    assert (outcome.code, outcome.errors) == (0, "")
    assert len(measured) == 1
    assert "≤ 4.5" in outcome.output


def test_another_recipe_by_the_same_name_is_refused(swept: tuple[Path, Outcome]) -> None:
    recipe, _ = swept
    outcome = call("sweep", recipe, *VARIED, "--set", "calibration.samples=4")
    assert outcome.code == 2
    assert outcome.errors.count("is another recipe than this member's: --overwrite runs it anew") == 4
