"""A file of GGUF that dashq cannot read, or that holds another model, is refused."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from dashq import CheckpointError, OutputError, run
from dashq.results.checkpoint import open_checkpoint, open_network
from dashq.results.verify import verify
from format_results import FormatResults
from gguf_results import SIZES, recipe
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
    recipe = build_recipe(other, tmp_path / "out", scheme=small_scheme(32, bits=8, solver="rtn"), serializer="gguf")
    folder = shutil.copytree(results["Q4_1"], tmp_path / "x")
    shutil.copy(run(recipe) / "model.gguf", folder)
    with pytest.raises(CheckpointError, match=r"proj.weight is uint8 .* where format 'gguf' needs uint8"):
        list(verify(folder))


def test_a_tensor_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    folder = run(recipe(model, tmp_path / "out"))
    path = folder / "model.gguf"
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_norm", b"blk.1.atom_norm"))
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, the first is model.layers.1.input_layernorm.weight"):
        open_network(folder, torch.float32)


def test_a_failure_while_the_file_is_written_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    model = pico_model("llama", tmp_path / "model", torch.float16, **SIZES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full_disk)
        with pytest.raises(OutputError, match="disk is full"):
            run(recipe(model, tmp_path / "out"))
    assert not (tmp_path / "out" / "model.gguf").exists()
    with pytest.raises(CheckpointError, match="is no finished result"):
        open_checkpoint(tmp_path / "out")
    folder = run(recipe(model, tmp_path / "out"))
    assert all(check.passed for check in verify(folder, "gguf"))
    assert not list(folder.glob("*.unfinished"))


def full_disk(writer: gguf.GGUFWriter) -> None:
    raise OSError("disk is full")
