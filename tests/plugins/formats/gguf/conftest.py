from pathlib import Path

import pytest
import torch

from dashq import run
from gguf_results import FAMILIES, SIZES, recipe
from pico import pico_model


@pytest.fixture(scope="session", params=FAMILIES)
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of one family, and its result."""
    folder = tmp_path_factory.mktemp(request.param)
    name, changes = FAMILIES[request.param]
    dtype = torch.bfloat16 if name in ("qwen2", "gemma3") else torch.float16
    model = pico_model(name, folder / "model", dtype, **(SIZES | changes))
    return model, run(recipe(model, folder / "out"))
