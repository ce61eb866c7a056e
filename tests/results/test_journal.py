"""A journal says what of an unfinished run is on disk, and only the run that wrote it goes on with it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import OutputError
from dashq.results.clock import Clock
from dashq.results.journal import Journal, Shard
from layer_reports import layer_report

RECIPE = {"model": "pico", "scheme": {"bits": 3}}
SHARDS = [
    Shard(parts=("outside",), tensors=("embed", "head"), bytes=100, layers=()),
    Shard(parts=("model.layers.0",), tensors=("a.codes",), bytes=7, layers=(layer_report("a", fallbacks=("x",)),)),
]
NAME = "dashq_journal.json"


def journal(folder: Path, recipe: dict[str, Any] = RECIPE) -> Journal:
    return Journal(folder, recipe, Clock(torch.device("cpu")))


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A folder that a run has left behind."""
    left = journal(tmp_path)
    left.shards.extend(SHARDS)
    left.clock.seconds["solve"] += 5.0
    left.claim(["part-00001.safetensors"])
    return tmp_path


def test_the_same_recipe_goes_on_where_the_run_was_stopped(interrupted: Path) -> None:
    resumed = journal(interrupted)
    resumed.clock.seconds["solve"] += 1.0
    resumed.resume(overwrite=False)
    assert resumed.shards == SHARDS
    assert resumed.clock.seconds == {"solve": 6.0}


def test_another_recipe_does_not_unless_it_takes_the_folder_for_its_own(interrupted: Path) -> None:
    other = journal(interrupted, RECIPE | {"model": "other"})
    before = (interrupted / NAME).read_bytes()
    with pytest.raises(OutputError, match=f"^{interrupted} holds an unfinished run of a different recipe; --overwrite"):
        other.resume(overwrite=False)
    other.resume(overwrite=True)
    assert (other.shards, dict(other.clock.seconds)) == ([], {})
    assert (interrupted / NAME).read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff", b"[]", b"{}", b"[" * 100_000, b'{"recipe": {}, "seconds": {}, "shards": [{"parts": []}]}'],
)
def test_a_broken_journal_is_told_with_its_place_unless_the_run_is_discarded(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(
        OutputError, match=f"^{tmp_path / NAME} is not as dashq writes it; --overwrite discards the run"
    ):
        journal(tmp_path).resume(overwrite=False)
    discarding = journal(tmp_path)
    discarding.resume(overwrite=True)
    assert discarding.shards == []


@pytest.mark.parametrize("finished", [False, True])
def test_in_a_new_folder_or_beside_a_finished_result_there_is_nothing_to_resume(
    finished: bool, interrupted: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = interrupted if finished else tmp_path_factory.mktemp("new")
    if finished:
        (folder / "report.json").write_text("{}")
    fresh = journal(folder)
    fresh.resume(overwrite=False)
    assert fresh.shards == []


def test_files_are_noted_on_disk_before_anybody_writes_them(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.claim(["b", "a"])
    own.claim(["c", "a"])
    content = json.loads((tmp_path / NAME).read_text())
    assert content == {"recipe": RECIPE, "seconds": {}, "shards": [], "files": ["a", "b", "c"]}


def test_all_of_a_shard_is_written_down(interrupted: Path) -> None:
    content = json.loads((interrupted / NAME).read_text())
    assert content["shards"] == json.loads(json.dumps([asdict(shard) for shard in SHARDS]))


def test_of_a_finished_run_no_journal_is_left(interrupted: Path) -> None:
    journal(interrupted).remove()
    assert list(interrupted.iterdir()) == []
