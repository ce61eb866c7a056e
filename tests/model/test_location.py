"""A model that lies neither on the disk nor on the hub is named."""

import re
from pathlib import Path

import pytest

from broken_models import is_untouched
from dashq import CheckpointError, run
from dashq.model.location import locate, own_files
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
