import shutil
from pathlib import Path

import pytest

from pico import pico_model


@pytest.fixture(scope="session")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards."""
    return pico_model("llama", tmp_path_factory.mktemp("checkpoint") / "model", shard="100KB")


@pytest.fixture
def model(whole_model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be broken."""
    return shutil.copytree(whole_model, tmp_path / "model")
