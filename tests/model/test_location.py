"""A model that lies neither on the disk nor on the hub is named."""

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from broken_models import INDEX, is_untouched
from dashq import CheckpointError, run
from dashq.data import Contents
from dashq.model.location import Location, locate, own_files
from recipes import build_recipe


@pytest.mark.parametrize("name", ["./absent", "absent", "absent.gguf", "org/absent"])
def test_a_model_that_is_nowhere_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
        run(build_recipe(Path(name), tmp_path / "out"))
    assert is_untouched(tmp_path / "out")


def test_a_tilde_in_a_models_path_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model").folder == tmp_path / "model"
    with pytest.raises(CheckpointError, match="no such model folder: ~nobody-of-this-name/model"):
        locate("~nobody-of-this-name/model")


def test_the_links_of_a_snapshot_in_the_hubs_cache_lead_to_the_models_own_files(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "1f", tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "2e").write_text("do as you like")
    (snapshot / "LICENSE").symlink_to(Path("../../blobs/2e"))
    (tmp_path / "private.txt").write_text("a secret")
    (snapshot / "LICENSE-private").symlink_to(tmp_path / "private.txt")
    assert own_files(snapshot, "LICENSE*") == [snapshot / "LICENSE"]


SHARDS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
SETS = ["model.safetensors", *SHARDS, "model.fp16.safetensors", "old.safetensors"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [(SETS, SETS[:1]), (SETS[1:], SHARDS)],
    ids=["one file before an index", "the shards of the index"],
)
def test_only_the_weights_that_transformers_would_open_are_fetched(
    files: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, snapshot = tmp_path / "hub", tmp_path / "snapshots" / "1f"
    for folder in (repository, snapshot):
        folder.mkdir(parents=True)
    for name in files:
        (repository / name).write_text("weights")
    weight_map = dict(zip("abc", [*SHARDS, SHARDS[0]], strict=True))
    (repository / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (repository / "config.json").write_text("{}")
    (repository / "README.md").write_text("a model")  # says under which licence
    (repository / "picture.png").write_text("a picture")

    def snapshot_download(
        model: str, allow_patterns: list[str], local_files_only: bool, revision: str | None = None
    ) -> str:
        assert not local_files_only
        assert (model, revision) in {("org/name", None), ("org/name", "1f")}
        for path in repository.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    location = locate("org/name")
    assert location.folder == snapshot
    assert {path.name for path in snapshot.iterdir()} == {*expected, INDEX, "config.json", "README.md"}


@pytest.mark.parametrize("trusted", [False, True])
def test_a_finished_model_lies_in_its_folder_and_its_code_is_trusted_as_said(trusted: bool, tmp_path: Path) -> None:
    contents = Contents(folder=tmp_path, layers={}, trust_remote_code=trusted)
    assert Location.of(contents) == Location(tmp_path, gguf=None, trust_remote_code=trusted)
