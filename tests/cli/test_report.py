"""`dashq report` writes the page of a result, or one page for several."""

import shutil
from pathlib import Path

import pytest

from commands import call
from dashq.results.page import MARK


def test_the_page_of_a_result_is_written_anew_where_it_was(result: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(result, tmp_path / "out")
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    outcome = call("report", folder)
    assert (outcome.code, outcome.output) == (0, f"the page is {folder / 'report.html'}\n")
    # The run knew the folder by the name in its recipe.
    assert (folder / "report.html").read_bytes() == before.replace(b"result:", b"out:").replace(
        b'"name":"result"', b'"name":"out"'
    )


def test_several_results_are_one_page_here_or_where_it_is_said(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("report", result, result).output == "the page is comparison.html\n"
    assert MARK in (tmp_path / "comparison.html").read_bytes()
    assert call("report", result, result, "--output", "mine.html").code == 0
    assert (tmp_path / "mine.html").read_bytes() == (tmp_path / "comparison.html").read_bytes()


def test_a_file_of_the_users_is_not_replaced(result: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.html").write_text("mine")
    outcome = call("report", result, "--output", tmp_path / "notes.html")
    assert outcome.code == 2
    assert outcome.errors.startswith(f"dashq: {tmp_path / 'notes.html'} is no page that dashq wrote")
    assert (tmp_path / "notes.html").read_text() == "mine"
