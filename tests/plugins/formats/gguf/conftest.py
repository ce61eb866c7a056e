from pathlib import Path

import pytest
import torch

from dashq import run
from gguf_results import FAMILIES, SIZES, recipe
from once import written_once
from pico import pico_model


@pytest.fixture(scope="session", params=FAMILIES)
def result(request: pytest.FixtureRequest, shared: Path) -> tuple[Path, Path]:
    """A model of one family, and its result."""
    folder = shared / "gguf" / request.param
    name, changes = FAMILIES[request.param]
    dtype = torch.bfloat16 if name in ("qwen2", "gemma3") else torch.float16
    model = written_once(folder / "model", lambda place: pico_model(name, place, dtype, **(SIZES | changes)))
    return model, written_once(folder / "out", lambda place: run(recipe(model, place)))
