"""`dashq compare` shows results side by side from their reports."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from commands import call
from dashq.results.report import read_report
from family_results import FamilyResults


@pytest.fixture
def other(families: FamilyResults) -> Path:
    return families.result("llama-untied-biased")


def test_figures_of_all_results_stand_in_one_row(result: Path, other: Path, tmp_path: Path) -> None:
    names = ["one", "two"]
    folders = [shutil.copytree(folder, tmp_path / name) for folder, name in zip((result, other), names, strict=True)]
    outcome = call("compare", *folders, "--worst", 3)
    assert outcome.code == 0, outcome
    lines = {line.split("  ")[0].strip(): line for line in outcome.output.splitlines() if line.strip()}
    assert next(line for line in outcome.output.splitlines() if line.strip()).split() == names
    for folder in folders:
        report = read_report(folder)
        assert report.judgement
        assert f"{report.totals.bits_per_weight:.3f}" in lines["bits per weight"]
        assert report.judgement.figures()["perplexity"] in lines["perplexity"]
    assert outcome.output.count(" at 3 bits") == 6
    assert "calibration" not in outcome.output


def test_more_results_than_fit_stand_below_each_other(result: Path, tmp_path: Path) -> None:
    folders = [shutil.copytree(result, tmp_path / f"result-{number}") for number in range(12)]
    outcome = call("compare", *folders)
    assert outcome.code == 0
    assert outcome.output.count("bits per weight") == 2
    assert all(f"result-{number}" in outcome.output for number in range(12))


def test_a_warning_says_where_texts_differ(result: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(result, tmp_path / "elsewhere")
    report = read_report(folder)
    assert report.judgement
    changed = replace(report, judgement=replace(report.judgement, original_perplexity=1.0))
    (folder / "report.json").write_text(json.dumps(changed.to_json()))
    assert "judged on different texts" in call("compare", result, folder).output
    assert "judged on different texts" not in call("compare", result, result).output


def test_a_folder_that_is_no_result_is_one_line(result: Path, tmp_path: Path) -> None:
    outcome = call("compare", result, tmp_path)
    assert outcome.code == 2
    assert outcome.errors == f"dashq: {tmp_path} is no finished result of dashq: it has no report.json\n"
