"""Lines of results say which version, day and machine they are of."""

import importlib.metadata
import json
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from bench._record import result_line

from bench import _record

RESULTS = Path(_record.__file__).parent / "results"


def test_a_line_holds_the_figures_and_their_origin() -> None:
    line = json.loads(result_line({"perplexity": 20.5}))
    assert line["perplexity"] == 20.5
    assert line["measured"].keys() == {"version", "commit", "date", "machine"}
    assert line["measured"]["version"] == importlib.metadata.version("dashq")
    assert line["measured"]["date"] == datetime.now(UTC).date().isoformat()
    assert line["measured"]["machine"].endswith(
        f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    )


def test_the_machine_tells_its_vector_units_by_which_times_differ_among_processors_of_one_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_record, "processor", lambda: "a processor")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert _record.machine("cpu").startswith("a processor with AVX2, ")


@pytest.mark.parametrize(("changed", "commit"), [(0, "abc1234"), (1, "abc1234+")])
def test_the_commit_tells_whether_the_code_was_changed(
    changed: int, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {"rev-parse": (0, "abc1234\n"), "diff": (changed, "")}
    monkeypatch.setattr(
        _record, "git", lambda _, command, *words: subprocess.CompletedProcess(command, *answers[command])
    )
    assert _record.commit(Path()) == commit


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*words: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(_record, "git", missing)
    assert _record.commit(Path()) == "unknown"


def test_no_result_names_a_place_on_one_machine() -> None:
    lines = [line for path in RESULTS.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert lines
    assert [line for line in lines if re.search(r'"(~|[A-Za-z]:\\\\|/)', line)] == []
