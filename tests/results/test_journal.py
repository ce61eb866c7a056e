"""A journal says what of an unfinished run is on disk, and only the run that wrote it goes on with it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import OutputError
from dashq.results.clock import Clock
from dashq.results.journal import Journal, Shard, parts_on_disk

RECIPE = {"model": "pico", "scheme": {"bits": 3}}
SHARDS = [
    Shard(file="one", parts=("outside",), tensors={"embed": "1", "head": "2"}, bytes=100, records=()),
    Shard(file="two", parts=("block.0",), tensors={"a.codes": "3"}, bytes=7, records=({"name": "a"},)),
]
NAME = "dashq_journal.json"


def journal(folder: Path, recipe: dict[str, Any] = RECIPE, **inputs: str) -> Journal:
    return Journal(folder, recipe, {"dtype": "float32"} | inputs, Clock(torch.device("cpu")))


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


def test_a_journal_that_somebody_changed_is_broken(interrupted: Path) -> None:
    content = json.loads((interrupted / NAME).read_text())
    content["shards"].pop()
    (interrupted / NAME).write_text(json.dumps(content))
    with pytest.raises(OutputError, match=f"^{interrupted / NAME} is not as dashq writes it; .*not what was written"):
        journal(interrupted).resume(overwrite=False)


def test_other_inputs_do_not_either_and_are_named(interrupted: Path) -> None:
    with pytest.raises(OutputError, match=r"made from something else; .*: dtype was float32 and is x"):
        journal(interrupted, dtype="x").resume(overwrite=False)
    discarding = journal(interrupted, dtype="x")
    discarding.resume(overwrite=True)
    assert discarding.shards == []


def test_in_a_new_folder_there_is_nothing_to_resume(tmp_path: Path) -> None:
    fresh = journal(tmp_path)
    fresh.resume(overwrite=False)
    assert (fresh.shards, fresh.threads) == ([], [torch.get_num_threads()])


def test_files_of_earlier_runs_go_and_those_that_are_resumed_from_stay(interrupted: Path) -> None:
    for name in ("part-00001.safetensors", "old.json", "notes.txt", "part-00001.safetensors.unfinished"):
        (interrupted / name).touch()
    journal(interrupted).clean(["old.json", "part-00001.safetensors"], ["part-00001.safetensors"])
    assert {path.name for path in interrupted.iterdir()} == {NAME, "part-00001.safetensors", "notes.txt"}


def test_files_are_noted_on_disk_before_anybody_writes_them(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.claim(["b", "a"])
    own.claim(["c", "a"])
    content = json.loads((tmp_path / NAME).read_text())
    usual = {"recipe": RECIPE, "inputs": {"dtype": "float32"}, "threads": [], "seconds": {}, "shards": [], "pieces": []}
    assert content == usual | {"files": ["a", "b", "c"], "seal": content["seal"]}


def test_all_of_a_shard_is_written_down(interrupted: Path) -> None:
    content = json.loads((interrupted / NAME).read_text())
    assert content["shards"] == json.loads(json.dumps([asdict(shard) for shard in SHARDS]))


def test_of_a_finished_run_no_journal_is_left(interrupted: Path) -> None:
    journal(interrupted).remove()
    assert list(interrupted.iterdir()) == []


def test_the_parts_on_disk_are_those_of_shards_and_pieces(tmp_path: Path) -> None:
    assert parts_on_disk(tmp_path / NAME) == set()
    left = journal(tmp_path)
    left.shards.append(SHARDS[0])
    left.pieces.append(SHARDS[1])
    left.save()
    assert parts_on_disk(tmp_path / NAME) == {"outside", "block.0"}
    (tmp_path / NAME).write_text("{")
    assert parts_on_disk(tmp_path / NAME) == set()
