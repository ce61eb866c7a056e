"""Members of a sweep that learn the same calibrate once, leave the same results, and nothing else."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from commands import call
from dashq import load_recipe, run
from dashq.quantizing.kept import dependence
from dashq.results.report import read_report
from interruptions import weights
from passing import Passes
from recipes import REGISTRY, small_recipe, small_scheme, write_recipe
from sweeps import recipe_in


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


def calibrations(folder: Path, *names: str) -> list[str]:
    return [read_report(folder / name).calibration for name in names]


def test_members_that_vary_bits_calibrate_once(model: Path, tmp_path: Path, passes: Passes) -> None:
    recipe = recipe_in(tmp_path, model)
    planned = call("sweep", recipe, "--vary", "scheme.bits=2,3,4", "--plan")
    where = f"the first one keeps it in {tmp_path}/out-sweep/calibration, up to 0.0 MB on disk, until all members are"
    assert f"members 1, 2, 3 learn the same of the text: {where} done" in planned.output
    outcome = call("sweep", recipe, "--vary", "scheme.bits=2,3,4")
    assert (outcome.code, outcome.errors) == (0, "")
    shared = passes.count
    folder = tmp_path / "out-sweep"
    assert calibrations(folder, "bits-2", "bits-3", "bits-4") == ["done", "read", "read"]
    rows = json.loads((folder / "sweep.json").read_text())["members"]
    assert [row["calibration"] for row in rows] == ["done", "read", "read"]
    assert not (folder / "calibration").exists()
    passes.count = 0
    alone = run(load_recipe(recipe, REGISTRY, ["scheme.bits=3"]))
    assert passes.count == shared
    assert weights(alone) == weights(folder / "bits-3")
    assert "keep: null" in (folder / "bits-3.yaml").read_text()  # a recipe that repeats the member names no folder


def test_members_that_vary_the_text_share_nothing(model: Path, tmp_path: Path, passes: Passes) -> None:
    outcome = call("sweep", recipe_in(tmp_path, model), "--vary", "calibration.samples=3,4")
    assert outcome.code == 0
    assert "learn the same" not in outcome.output
    assert calibrations(tmp_path / "out-sweep", "samples-3", "samples-4") == ["done", "done"]


def test_where_layers_see_quantized_ones_nothing_is_shared(model: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, model)
    options = ["--vary", "scheme.bits=2,3", "--set", "calibration.propagate=quantized", "--plan"]
    assert "learn the same" not in call("sweep", recipe, *options).output
    planned = call("sweep", recipe, "--vary", "scheme.bits=2,3", "--vary", "calibration.propagate=original,quantized")
    assert "members 1, 3 learn the same" in planned.output


def test_jobs_of_an_array_share_what_the_first_one_keeps(model: Path, tmp_path: Path) -> None:
    recipe, folder = recipe_in(tmp_path, model), tmp_path / "out-sweep"
    varied = ["--vary", "scheme.bits=2,3"]
    assert call("sweep", recipe, *varied, "--member", 2).code == 0
    assert list((folder / "calibration").glob("*/*.safetensors"))  # the other member waits for it
    assert call("sweep", recipe, *varied, "--member", 1).code == 0
    assert calibrations(folder, "bits-3", "bits-2") == ["done", "read"]
    assert not (folder / "calibration").exists()
    later = call("sweep", recipe, "--vary", "scheme.bits=2,3,4")
    assert later.code == 0
    assert calibrations(folder, "bits-4") == ["done"]  # what was kept is gone, and nobody waits for more
    anew = call("sweep", recipe, *varied, "--overwrite", "-q")
    assert anew.code == 0
    assert calibrations(folder, "bits-2", "bits-3") == ["done", "read"]
    assert call("sweep", recipe, *varied, "--member", 1, "--overwrite", "-q").code == 0
    assert calibrations(folder, "bits-2") == ["done"]


def test_sums_that_the_disk_has_no_room_for_are_not_shared(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    planned = call("sweep", recipe_in(tmp_path, model), "--vary", "scheme.bits=2,3", "--plan")
    assert "members 1, 2 learn the same of the text, which is not shared: it could take 0.0 MB" in planned.output


def test_the_folder_that_a_recipe_names_is_left_as_it_is(model: Path, tmp_path: Path) -> None:
    keep = tmp_path / "mine"
    recipe = recipe_in(tmp_path, model)
    outcome = call("sweep", recipe, "--vary", "scheme.bits=2,3", "--set", f"calibration.keep={keep}")
    assert outcome.code == 0
    assert "learn the same" not in outcome.output
    assert calibrations(tmp_path / "out-sweep", "bits-2", "bits-3") == ["done", "read"]
    assert len(list(keep.glob("*/*.safetensors"))) == 3


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"scheme": small_scheme(32, bits=2, solver="rtn")}, True),
        ({"serializer": "mlx", "certificate_groups": 9, "budget": 4}, True),
        ({"overrides": [{"match": ".*down_proj", "bits": 4}]}, True),
        ({"overrides": [{"match": ".*down_proj", "skip": True}]}, False),
        ({"overrides": [{"match": ".*down_proj", "estimator": "full"}]}, False),
        ({"scheme": small_scheme(estimator="full")}, False),
        ({"calibration": {"dataset": "pydoc", "samples": 4, "sequence_length": 40}}, False),
        ({"dtype": "float32"}, False),
        ({"head": {"bits": 4}}, False),
    ],
)
def test_recipes_learn_the_same_where_they_differ_in_what_comes_after(
    tmp_path: Path, changes: dict[str, Any], same: bool
) -> None:
    plain, changed = (
        load_recipe(write_recipe(tmp_path / "r.yaml", small_recipe(Path("m"), tmp_path / "out", **own)), REGISTRY)
        for own in ({}, changes)
    )
    assert (dependence(plain) == dependence(changed)) == same
