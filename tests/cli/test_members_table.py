"""A sweep shows its plan first, and the figures of its results last, on the terminal and in files."""

import csv
import json
from pathlib import Path

import pytest

from commands import Outcome, call
from sweeps import NAMES, VARIED, recipe_in


@pytest.fixture(scope="module")
def swept(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    recipe = recipe_in(tmp_path_factory.mktemp("sweep"), model)
    return recipe, call("sweep", recipe, *VARIED)


def test_it_ends_with_a_comparison_on_the_terminal_and_in_files(swept: tuple[Path, Outcome]) -> None:
    recipe, outcome = swept
    folder = recipe.with_name("out-sweep")
    rows = json.loads((folder / "sweep.json").read_text())["members"]
    assert [row["member"] for row in rows] == NAMES
    table = outcome.output.splitlines()[-6:-2]
    for number, (row, line) in enumerate(zip(rows, table, strict=True), start=1):
        report = json.loads((folder / row["folder"] / "report.json").read_text())
        assert row["bits_per_weight"] == report["totals"]["bits_per_weight"]
        assert row["bytes_on_disk"] == report["totals"]["bytes_on_disk"]
        assert {key: row[key] for key in ("divergence", "agreement", "perplexity")}.items() <= report[
            "judgement"
        ].items()
        assert line.split()[:4] == [
            str(number),
            str(row["scheme.bits"]),
            row["scheme.solver"],
            f"{row['bits_per_weight']:.3f}",
        ]
        assert line.split()[-3] == f"{row['divergence']:.4f}"
    with (folder / "sweep.csv").open() as file:
        assert [line["scheme.solver"] for line in csv.DictReader(file)] == ["rtn", "irls", "rtn", "irls"]
    assert (folder / "sweep.svg").read_text().startswith("<?xml")
    assert f"the sweep is in {folder}: sweep.json, sweep.csv, sweep.svg" in outcome.output


def test_all_members_are_planned_before_one_is_run(model: Path, tmp_path: Path) -> None:
    outcome = call("sweep", recipe_in(tmp_path, model), "--vary", "scheme.bits=3,9", "--vary", "scheme.solver=rtn")
    assert outcome.code == 2
    assert "--set scheme.bits=9: scheme.bits: should be less than or equal to 8" in outcome.errors
    outcome = call("sweep", recipe_in(tmp_path, model), "--vary", "scheme.grouper.size=16,32")
    assert outcome.code == 2
    assert "scheme.grouper.size=32: model.layers.0.self_attn.q_proj" in outcome.errors
    planned = call("sweep", recipe_in(tmp_path, model), "--vary", "scheme.bits=2,3", "--plan")
    assert planned.code == 0
    assert [line.split()[:3] for line in planned.output.splitlines()[1:3]] == [["1", "2", "4.000"], ["2", "3", "5.000"]]
    assert not (tmp_path / "out-sweep").exists()
