"""Tensors wait until a file is full; a file on disk keeps them, under names that hold the number of files at last."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dashq.results.shards
from dashq.results.clock import Clock
from dashq.results.journal import Journal
from dashq.results.shards import ShardWriter
from layer_reports import layer_report
from tensors import noise

PARTS: Mapping[str, Mapping[str, Tensor]] = {
    "outside": {"embed": noise(0, 4, 3), "norm": noise(1, 3)},
    "block.0": {"block.0.codes": torch.arange(6, dtype=torch.uint8).view(2, 3)},
    "block.1": {"block.1.codes": torch.arange(6, dtype=torch.uint8).view(3, 2).T},
}


def writer(folder: Path) -> ShardWriter:
    journal = Journal(folder, {"model": "pico"}, Clock(torch.device("cpu")))
    journal.resume(overwrite=False)
    return ShardWriter(journal)


def write(shards: ShardWriter) -> None:
    for part, tensors in PARTS.items():
        shards.add(part, tensors, [layer_report(part)] if "block" in part else [])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part fills a shard."""
    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", 1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "dashq_journal.json")


def test_what_is_not_enough_for_a_file_waits_until_it_is_flushed(tmp_path: Path) -> None:
    shards = writer(tmp_path)
    write(shards)
    assert names(tmp_path) == []
    assert shards.finished_parts == set()
    shards.flush()
    assert names(tmp_path) == ["part-00001.safetensors"]
    assert shards.finished_parts == PARTS.keys()
    shards.flush()  # nothing waits any more
    assert names(tmp_path) == ["part-00001.safetensors"]


def test_a_file_is_written_as_soon_as_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", 60 + 6)  # of numbers outside and of one block
    shards = writer(tmp_path)
    write(shards)
    assert names(tmp_path) == ["part-00001.safetensors"]
    assert shards.finished_parts == {"outside", "block.0"}
    assert [report.name for report in shards.layers] == ["block.0", "block.1"]


@pytest.mark.usefixtures("small")
def test_tensors_come_back_part_by_part_and_by_name_also_in_another_process(tmp_path: Path) -> None:
    write(writer(tmp_path))
    shards = writer(tmp_path)
    assert shards.first_names == [f"part-0000{number}.safetensors" for number in (1, 2, 3)]
    assert shards.finished_parts == PARTS.keys()
    for part, tensors in PARTS.items():
        read = shards.read(part)
        assert read.keys() == tensors.keys()
        assert all(read[name].equal(tensor) for name, tensor in tensors.items())
    handles = shards.handles()
    every = {name: tensor for tensors in PARTS.values() for name, tensor in tensors.items()}
    assert handles.keys() == every.keys()
    assert all(handles[name][...].equal(tensor) for name, tensor in every.items())


def test_a_tensor_is_kept_as_it_was_when_it_was_added(tmp_path: Path) -> None:
    shards, tensor = writer(tmp_path), torch.zeros(2, 3)
    shards.add("part", {"view": tensor[0], "grad": torch.nn.Parameter(tensor.clone())})
    tensor.fill_(7)
    shards.flush()
    assert shards.read("part")["view"].tolist() == [0, 0, 0]
    assert shards.read("part")["grad"].tolist() == [[0, 0, 0]] * 2


def test_one_file_has_the_name_of_a_whole_model(tmp_path: Path) -> None:
    shards = writer(tmp_path)
    write(shards)
    shards.flush()
    shards.name_shards()
    assert names(tmp_path) == shards.final_names == ["model.safetensors"]


@pytest.mark.usefixtures("small")
def test_several_files_know_their_number_and_have_an_index(tmp_path: Path) -> None:
    shards = writer(tmp_path)
    write(shards)
    shards.name_shards()
    final = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert shards.final_names == final
    assert names(tmp_path) == [*final, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 60 + 6 + 6}
    assert {name: set(load_file(tmp_path / name)) for name in final} == {
        name: {tensor for tensor, file in index["weight_map"].items() if file == name} for name in final
    }
    assert shards.read("block.1").keys() == {"block.1.codes"}  # under the final name too
    shards.name_shards()  # again, where a run was interrupted in between
    assert names(tmp_path) == [*final, "model.safetensors.index.json"]


@pytest.mark.usefixtures("small")
def test_every_name_is_in_the_journal_before_it_is_on_disk(tmp_path: Path) -> None:
    shards = writer(tmp_path)
    write(shards)
    shards.name_shards()
    noted = json.loads((tmp_path / "dashq_journal.json").read_text())["files"]
    assert {*shards.first_names, *shards.final_names, "model.safetensors.index.json"} == {*noted}


@pytest.mark.usefixtures("small")
def test_shards_go_where_their_tensors_lie_in_one_file(tmp_path: Path) -> None:
    shards = writer(tmp_path)
    write(shards)
    shards.remove()
    assert names(tmp_path) == []
