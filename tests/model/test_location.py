"""A model that lies neither on the disk nor on the hub is named."""

import re
from pathlib import Path

import pytest

from broken_models import is_untouched
from dashq import CheckpointError, run
from recipes import build_recipe


@pytest.mark.parametrize("name", ["./absent", "absent", "absent.gguf", "org/absent"])
def test_a_model_that_is_nowhere_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / name))):
        run(build_recipe(Path(name), tmp_path / "out"))
    assert is_untouched(tmp_path / "out")
