"""`dashq sweep` leaves a result for each member, or for one as a job of an array."""

import json
from pathlib import Path

import pytest

from commands import Outcome, call, execute
from interruptions import weights
from sweeps import NAMES, VARIED, recipe_in


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    recipe = recipe_in(tmp_path_factory.mktemp("sweep"), model)
    return recipe, call("sweep", recipe, *VARIED)


def test_every_member_has_a_result_and_its_recipe(swept: tuple[Path, Outcome]) -> None:
    recipe, outcome = swept
    assert (outcome.code, outcome.errors) == (0, "")
    folder = recipe.with_name("out-sweep")
    files = {path.name for path in folder.iterdir()}
    assert files == {*NAMES, *(f"{name}.yaml" for name in NAMES), "sweep.json", "sweep.csv", "sweep.svg"}
    again = call("run", folder / f"{NAMES[0]}.yaml")
    assert "already holds a finished result" in again.errors


def test_a_member_alone_can_be_run_as_a_job_of_an_array(model: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model)
    assert call("sweep", recipe, *VARIED, "--members").output == "4\n"
    outcome = call("sweep", recipe, *VARIED, "--member", 3, "--output", tmp_path / "here", "-q")
    assert (outcome.code, outcome.output, outcome.errors) == (0, "", "")
    folders = {path.name for path in (tmp_path / "here").iterdir() if path.is_dir()}
    assert folders == {NAMES[2], "calibration"}  # what the member learned waits for the others
    assert [row["member"] for row in json.loads((tmp_path / "here" / "sweep.json").read_text())["members"]] == NAMES[
        2:3
    ]
    beyond = call("sweep", recipe, *VARIED, "--member", 5)
    assert (beyond.code, beyond.errors) == (2, "dashq: --member 5: there are 4 members\n")


def test_members_are_run_by_several_processes_at_a_time(
    swept: tuple[Path, Outcome], model: Path, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, model)
    outcome = execute("sweep", recipe, *VARIED, "--processes", 2, OMP_NUM_THREADS="1")
    assert (outcome.code, outcome.errors) == (0, "")
    for name in NAMES:
        result, expected = (path.with_name("out-sweep") / name for path in (recipe, swept[0]))
        assert weights(result) == weights(expected)
    refused = call("sweep", recipe, *VARIED, "--processes", 2, "--overwrite")
    assert (refused.code, refused.errors) == (
        2,
        "dashq: --processes is for a whole sweep, and not for --member or --overwrite\n",
    )
