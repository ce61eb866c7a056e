"""A file of GGUF that dashq cannot read, or that holds another model, is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import CheckpointError, run
from dashq.results.checkpoint import open_checkpoint
from dashq.results.verify import verify
from format_results import FormatResults
from pico import WIDE, pico_model
from recipes import build_recipe, small_scheme


def test_a_gguf_file_of_an_unknown_version_is_refused(results: FormatResults, tmp_path: Path) -> None:
    path = shutil.copytree(results["Q4_1"], tmp_path / "x") / "model.gguf"
    content = path.read_bytes()
    path.write_bytes(content[:4] + (99).to_bytes(4, "little") + content[8:])
    with pytest.raises(CheckpointError, match="version 99"):
        open_checkpoint(tmp_path / "x")


def test_a_gguf_file_of_another_model_is_refused(results: FormatResults, tmp_path: Path) -> None:
    sizes: dict[str, Any] = WIDE | {"intermediate_size": 768}
    other = pico_model("llama", tmp_path / "other", torch.float16, **sizes)
    recipe = build_recipe(
        other, tmp_path / "out", scheme=small_scheme(32, bits=5), serializer="gguf", certificate_groups=0
    )
    folder = shutil.copytree(results["Q4_1"], tmp_path / "x")
    shutil.copy(run(recipe) / "model.gguf", folder)
    with pytest.raises(CheckpointError, match=r"proj.weight is torch.uint8 .* where format 'gguf' needs torch.uint8"):
        list(verify(folder))
