"""A good result never dies for a bad run: the new one takes its place when it is whole."""

import errno
import itertools
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

import dashq.results.shards
from broken_models import DOWN, change
from commands import call
from dashq import DashqError, OutputError, run
from dashq.results.convert import convert
from dashq.results.events import LayerDone, RunStarted
from dashq.results.folder import NEXT, PREVIOUS
from dashq.results.workplace import beside, unfinished
from interruptions import Interruption, Steps, after_layers, contents, failing_at, interrupt, weights
from pico import pico_model
from recipes import REGISTRY, TEXT, build_recipe, small_recipe, write_recipe


@pytest.fixture
def result(result: Path, tmp_path: Path) -> Path:
    """A copy of a result, to be replaced."""
    return shutil.copytree(result, tmp_path / "house" / "out")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of the model is on disk as soon as it is done."""
    monkeypatch.setattr(dashq.results.shards, "PIECE_SECONDS", 0)


def test_a_result_outlives_runs_that_fail(result: Path, tmp_path: Path) -> None:
    before = contents(result)
    broken = pico_model("llama", tmp_path / "model", shard="100KB")
    change(broken, DOWN, lambda tensors: tensors[DOWN].view(-1)[:1].fill_(float("nan")))
    recipes = [
        build_recipe(broken, result),
        build_recipe(broken, result, calibration=TEXT | {"samples": 10**6}),
        build_recipe(broken, result, overrides=[{"match": "nothing", "bits": 4}]),
    ]
    for recipe in recipes:
        with pytest.raises(DashqError):
            run(recipe, overwrite=True)
        assert contents(result) == before
    (result.parent / "out.yaml").unlink()
    assert not beside(result, PREVIOUS).exists()


def test_a_run_works_in_its_output_or_beside_an_earlier_result(result: Path, tmp_path: Path) -> None:
    assert unfinished(tmp_path / "new") == tmp_path / "new"
    assert unfinished(result) == beside(result, NEXT)


@pytest.mark.usefixtures("small_pieces")
def test_an_interrupted_replacement_goes_on_beside_the_earlier_result(model: Path, result: Path) -> None:
    before = contents(result)
    recipe = build_recipe(model, result, overrides=[{"match": ".*", "bits": 1}])
    with pytest.raises(Interruption):
        run(recipe, after_layers(16), overwrite=True)
    assert contents(result) == before
    with pytest.raises(OutputError, match="already holds a finished result; --overwrite replaces it"):
        run(recipe)
    solved = []
    assert run(recipe, lambda event: solved.append(event) if isinstance(event, LayerDone) else None, True) == result
    assert len(solved) == 7
    assert contents(result).keys() == before.keys()
    assert weights(result) != {name: before[name] for name in weights(result)}
    assert {path.name for path in result.parent.iterdir()} == {"out", "out.yaml"}


def test_users_own_files_and_folders_move_with_the_output(model: Path, result: Path) -> None:
    work = {"notes.txt": b"mine", "plots/one.svg": b"a", "deep/er/two.svg": b"b"}
    for name, content in work.items():
        (result / name).parent.mkdir(parents=True, exist_ok=True)
        (result / name).write_bytes(content)
    (result / "empty").mkdir()
    (result / "link").symlink_to(model)
    run(build_recipe(model, result), overwrite=True)
    assert work.items() <= contents(result).items()
    assert (result / "empty").is_dir()
    assert (result / "link").is_symlink()
    assert (model / "config.json").exists()


def test_a_file_that_came_while_the_run_went_on_is_kept_aside_and_named(model: Path, result: Path) -> None:
    recipe = build_recipe(model, result)

    def leave(event: object) -> None:
        if not isinstance(event, RunStarted):
            return
        (result / "extra.txt").write_text("mine")
        (beside(result, NEXT) / "extra.txt").write_text("of the result")

    with pytest.raises(OutputError, match=rf"{PREVIOUS} holds .*extra.txt, which is also in {result}: move it away"):
        run(recipe, leave, overwrite=True)
    assert (beside(result, PREVIOUS) / "extra.txt").read_text() == "mine"
    assert (result / "report.json").exists()
    shutil.move(beside(result, PREVIOUS) / "extra.txt", result.parent / "extra.txt")
    with pytest.raises(OutputError, match="already holds a finished result"):
        run(recipe)
    assert not beside(result, PREVIOUS).exists()


def test_a_conversion_that_fails_leaves_the_earlier_one(result: Path, tmp_path: Path) -> None:
    target = convert(result, REGISTRY.serializers["dashq"](), tmp_path / "converted")
    before = contents(target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dashq.results.output.Output.report", interrupt)
        with pytest.raises(Interruption):
            convert(result, REGISTRY.serializers["dashq"](), target, overwrite=True)
    assert contents(target) == before
    convert(result, REGISTRY.serializers["dashq"](), target, overwrite=True)
    assert weights(target) == weights(result)
    assert not beside(target, NEXT).exists()


def test_a_link_to_a_folder_stays_one(model: Path, result: Path) -> None:
    link = result.parent / "link"
    link.symlink_to(result)
    run(build_recipe(model, link, overrides=[{"match": ".*", "bits": 1}]), overwrite=True)
    assert link.is_symlink()
    assert '"bits": 1' in (result / "report.json").read_text()


def test_a_disk_of_its_own_cannot_be_replaced_as_a_whole(
    model: Path, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(result)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == result)
    with pytest.raises(OutputError, match=f"{result} is where a disk is mounted: its result cannot be replaced"):
        run(build_recipe(model, result), overwrite=True)
    assert contents(result) == before


def test_a_refused_run_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(DashqError):
        run(build_recipe(model, tmp_path / "out", calibration=TEXT | {"samples": 10**6}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "analysis.json", "dashq_journal.json", "report.json"])
def test_a_folder_where_a_file_should_be_is_named_before_the_work(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / name / "below").mkdir(parents=True)
    (tmp_path / "out" / "dashq.lock").touch()
    write_recipe(tmp_path / "recipe.yaml", small_recipe(model, tmp_path / "out"))
    outcome = call("run", tmp_path / "recipe.yaml", "--overwrite")
    assert outcome.code == 2
    assert f"no run wrote {name} in the output folder {tmp_path / 'out'}" in outcome.errors
    assert (tmp_path / "out" / name / "below").is_dir()


# A result that Steps can finish, and what the same command makes of whatever a stop leaves.


def whole_in(place: Path, whole: dict[str, bytes]) -> bool:
    """True where some folder holds a whole result, an earlier or a later one, and the user's file is there."""
    results = [contents(path) for path in place.iterdir()]
    parts = {name: content for name, content in whole.items() if ".safetensors" in name}
    return any(whole.keys() <= files.keys() and parts.items() <= files.items() for files in results)


@pytest.mark.parametrize("earlier", [False, True], ids=["new folder, pieces", "earlier result, shards"])
@pytest.mark.parametrize(("fault", "done"), [("killed", False), ("killed", True), ("disk full", False)])
def test_a_fault_at_any_moment_is_mended_by_the_same_command(
    fault: str, done: bool, earlier: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes most of the time, and changes nothing here
    monkeypatch.setattr(dashq.results.shards, "SHARD_BYTES", 1 if earlier else 200)
    monkeypatch.setattr(dashq.results.shards, "PIECE_SECONDS", 0)
    steps = Steps(model, tmp_path)
    steps.go(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    error, details = (Interruption, ()) if fault == "killed" else (OSError, (errno.ENOSPC, "No space left on device"))
    moment = 0
    for moment in itertools.count():
        place = tmp_path / f"at{moment}"
        folder = place / "out"
        place.mkdir()
        if earlier:
            shutil.copytree(tmp_path / "whole", folder)
            (folder / "config.json").write_text("of the earlier result")
            (folder / "notes.txt").write_text("mine")
        with failing_at(moment, done, error, *details):
            try:
                steps.go(folder, overwrite=earlier)
            except (Interruption, OutputError, OSError):
                pass
            else:
                break
        if earlier:
            assert whole_in(place, whole)
            assert any((path / "notes.txt").exists() for path in place.iterdir())
        with suppress(OutputError):  # the result is finished
            steps.go(folder, overwrite=earlier)
        assert contents(folder).keys() == whole.keys() | ({"notes.txt"} if earlier else set())
        assert weights(folder) == weights(tmp_path / "whole")
        assert (folder / "config.json").read_bytes() == whole["config.json"]
        assert list(place.iterdir()) == [folder]
    assert moment > 10
