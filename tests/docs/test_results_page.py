"""The page of results says of every line where it is from, and marks what is of an older version."""

import json
from collections.abc import Mapping
from datetime import date
from typing import Any

import pytest

import results_page
from results_page import RESULTS, Origins, headline, section, shown_best

ROOT = RESULTS.parents[1]
FILES = sorted(RESULTS.glob("*.jsonl"))
MEASURED = {"version": "0.1.0", "commit": "abc1234", "date": "2026-11-26", "machine": "a processor, 1 thread"}


def line(**figures: Any) -> Mapping[str, Any]:
    return {"measured": MEASURED, **figures}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_has_its_version_day_and_machine(path: Any) -> None:
    for text in path.read_text("utf-8").splitlines():
        measured = json.loads(text)["measured"]
        assert measured.keys() - {"reconstructed"} == MEASURED.keys()
        assert all(measured.values())
        date.fromisoformat(measured["date"])


def test_every_file_stands_on_the_page() -> None:
    page = results_page.results_page("")
    assert FILES
    for path in FILES:
        assert section(path.stem, results_page.read(path.stem)) in page


def test_every_description_is_of_a_file() -> None:
    described = results_page.TABLES.keys() | results_page.SECTIONS.keys()
    assert described - {path.stem for path in FILES} == {"about"}


def test_a_file_without_a_description_shows_its_numbers_and_texts() -> None:
    text = section("new_bench", [line(name="one", seconds=2.5, phases={"load": 1})])
    assert "## New bench" in text
    assert "| name | seconds | measured |" in text
    assert "| one | 2.5 | a |" in text
    assert "- a: 2026-11-26, version 0.1.0 at `abc1234`, a processor, 1 thread (noted by the bench)." in text


def test_lines_from_before_a_change_are_marked() -> None:
    before, after = line(method="hybrid"), line(method="hybrid", measured={**MEASURED, "date": "2026-11-27"})
    origins = Origins("peers")
    assert [origins.letter(row) for row in (before, after, before, line(method="gptqmodel"))] == ["a†", "b", "a†", "c"]
    assert "Older version" in next(origins.lines())


def test_the_headline_says_what_was_not_measured() -> None:
    assert shown_best("peers", []) == "not measured"
    assert "| original, 16 bits | 20.97 |" in headline()


def test_the_headline_takes_the_best_line_and_marks_more_text() -> None:
    rows = [line(perplexity={"wikitext2": value}, tokens=2048) for value in (31.0, 30.25)]
    assert shown_best("peers", rows) == "30.25¹"


def test_help_and_readme_tell_the_times_of_the_levels_as_measured() -> None:
    seconds = {row["level"]: row["cpu_seconds"] for row in results_page.read("levels")}
    assert round(seconds["usual"] / seconds["fast"]) == 3
    times = f"{seconds['best'] / seconds['usual']:.0f} times"
    help_of_levels = (ROOT / "core" / "dashq_cli" / "init.py").read_text("utf-8")
    assert "about a third of the time" in help_of_levels
    assert f"about {times} the time" in help_of_levels
    assert f"about a third of the time, and `--best` {times} as long" in (ROOT / "README.md").read_text("utf-8")
