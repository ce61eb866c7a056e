"""Tensors wait until a file is full, and lie in pieces after a minute; they are read only as they were written."""

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dashq.results.shards
from dashq import OutputError, run
from dashq.results.clock import Clock
from dashq.results.events import Event, LayerDone
from dashq.results.fingerprint import tensor_digest
from dashq.results.folder import JOURNAL, listed_files
from dashq.results.journal import Journal
from dashq.results.report import read_report
from dashq.results.shards import Records, ShardWriter, Tensors
from interruptions import Interruption, after_layers, contents, failing_at, weights
from layer_reports import layer_report
from recipes import TEXT, build_recipe
from tensors import noise

PARTS: Mapping[str, Mapping[str, Tensor]] = {
    "outside": {"embed": noise(0, 4, 3), "norm": noise(1, 3)},
    "block.0": {"block.0.codes": torch.arange(6, dtype=torch.uint8).view(2, 3)},
    "block.1": {"block.1.codes": torch.arange(6, dtype=torch.uint8).view(3, 2).T},
}


def writer(folder: Path) -> ShardWriter:
    folder.mkdir(exist_ok=True)
    journal = Journal(folder, {"model": "pico"}, {}, Clock(torch.device("cpu")))
    journal.resume(overwrite=False)
    shards = ShardWriter(journal)
    shards.resume(listed_files(folder, JOURNAL), overwrite=False)
    return shards


def write(shards: ShardWriter) -> None:
    for part, tensors in PARTS.items():
        shards.add(part, tensors, [asdict(layer_report(part))] if "block" in part else [])


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
    assert [record["name"] for record in shards.records] == ["block.0", "block.1"]


@pytest.mark.parametrize(
    ("seconds", "saved"),
    [
        (10, [5]),  # after five parts fifty seconds are over, and the next part ends after sixty
        (30, [1, 2, 3, 4, 5, 6]),
        (90, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_no_part_waits_longer_for_the_disk_than_a_minute_or_the_next_part(
    seconds: int, saved: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    shards, writes = writer(tmp_path), []
    for number in range(1, 7):
        now += seconds
        before = shards.finished_parts
        shards.add(f"block.{number}", {f"block.{number}.codes": torch.ones(3)})
        if shards.finished_parts != before:
            writes.append(number)
    assert writes == saved


def test_what_waits_can_be_written_before_a_run_ends(tmp_path: Path) -> None:
    shards = writer(tmp_path)
    shards.save()  # nothing waits yet
    write(shards)
    shards.save()
    assert names(tmp_path) == ["part-00001-piece-00001.safetensors"]
    assert writer(tmp_path).finished_parts == PARTS.keys()


@pytest.mark.usefixtures("small")
def test_tensors_come_back_part_by_part_and_by_name_also_in_another_process(tmp_path: Path) -> None:
    write(writer(tmp_path))
    shards = writer(tmp_path)
    assert shards.first_names == [f"part-0000{number}.safetensors" for number in (1, 2, 3)]
    assert shards.finished_parts == PARTS.keys()
    for part, tensors in PARTS.items():
        read = shards.read(part, "")
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
    assert shards.read("part", "")["view"].tolist() == [0, 0, 0]
    assert shards.read("part", "")["grad"].tolist() == [[0, 0, 0]] * 2


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
    assert shards.read("block.1", "").keys() == {"block.1.codes"}  # under the final name too
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


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of the model is on disk as soon as it is done."""
    monkeypatch.setattr(dashq.results.shards, "PIECE_SECONDS", 0)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("propagate", ["original", "quantized"])
@pytest.mark.parametrize("shard", [2**28, 20_000], ids=["one shard", "several"])
def test_only_the_block_that_was_interrupted_is_solved_again(
    propagate: str, shard: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", shard)
    text = TEXT | {"propagate": propagate}
    whole = run(build_recipe(model, tmp_path / "whole", calibration=text))
    recipe = build_recipe(model, tmp_path / "out", calibration=text)
    layers: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, LayerDone):
            layers.append(event.report.name)

    for _ in range(2):
        with pytest.raises(Interruption):
            run(recipe, after_layers(8))
    run(recipe, note)
    assert [name.split(".")[2] for name in layers] == ["2"] * 7
    assert weights(tmp_path / "out") == weights(whole)
    assert contents(tmp_path / "out").keys() == contents(whole).keys()


def test_what_comes_together_within_a_minute_waits(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        run(build_recipe(model, tmp_path / "out"), after_layers(8))
    assert contents(tmp_path / "out").keys() == {"dashq_journal.json"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def swap(path: Path) -> None:
    other = path.with_name(path.name.replace("00002", "00001"))
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)


def change_one_number(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.layers.0.input_layernorm.weight"][0] += 1
    save_file(tensors, path)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("damage", [cut, zero, swap, change_one_number, Path.unlink])
@pytest.mark.parametrize(
    ("shard", "name"), [(2**28, "part-00001-piece-00002"), (1, "part-00002")], ids=["piece", "shard"]
)
def test_files_that_are_not_as_the_run_wrote_them_are_refused_by_name(
    damage: Callable[[Path], object],
    shard: int,
    name: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", shard)
    recipe = build_recipe(model, tmp_path / "out")
    with pytest.raises(Interruption):
        run(recipe, after_layers(9))
    damage(tmp_path / "out" / f"{name}.safetensors")
    before = contents(tmp_path / "out")
    with pytest.raises(OutputError) as refusal:
        run(recipe)
    assert "is not as the interrupted run wrote it; --overwrite discards the run: " in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert contents(tmp_path / "out") == before
    assert (run(recipe, overwrite=True) / "report.json").exists()


def test_digests_are_those_of_what_was_written(result: Path) -> None:
    tensors = load_file(result / "model.safetensors")
    assert read_report(result).tensors == {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    assert torch.float16 in {tensor.dtype for tensor in tensors.values()}


def doubled(tensors: Tensors, records: Records) -> tuple[Tensors, Records]:
    return {name: tensor * 2 for name, tensor in tensors.items()}, [{**record, "bits": 7} for record in records]


@pytest.mark.usefixtures("small")
def test_shards_change_with_their_records_and_keep_their_parts(tmp_path: Path) -> None:
    shards = writer(tmp_path)
    write(shards)
    shards.change(doubled)
    assert names(tmp_path) == [f"tuned-0000{number}.safetensors" for number in (1, 2, 3)]
    assert shards.finished_parts == PARTS.keys()
    assert [record["bits"] for record in shards.records] == [7, 7]
    for part, tensors in PARTS.items():
        read = writer(tmp_path).read(part, "")  # which compares digests
        assert all(read[name].equal(tensor * 2) for name, tensor in tensors.items())
        assert all(shards.digests[name] == tensor_digest(tensor * 2) for name, tensor in tensors.items())
    shards.change(doubled)  # once is all
    assert shards.handles()["norm"][...].equal(PARTS["outside"]["norm"] * 2)
    shards.name_shards()
    assert names(tmp_path) == [*shards.final_names, "model.safetensors.index.json"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("done", [False, True])
def test_a_change_that_is_stopped_anywhere_goes_on_as_if_it_was_not(done: bool, tmp_path: Path) -> None:
    whole = writer(tmp_path / "whole")
    write(whole)
    whole.change(doubled)
    moment = 0
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        shards = writer(folder)
        write(shards)
        try:
            with failing_at(moment, done, Interruption):
                shards.change(doubled)
        except Interruption:
            resumed = writer(folder)
            resumed.change(doubled)
            assert resumed.digests == whole.digests
            assert [record["bits"] for record in resumed.records] == [7, 7]
            assert weights(folder) == weights(tmp_path / "whole")
        else:
            break
    assert moment > 9
