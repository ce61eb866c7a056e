"""Results in the format of GPTQ: zeros that no kernel reads are refused, and settings name fused layers."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dashq import CheckpointError, run
from dashq.results.verify import verify
from recipes import build_recipe, small_scheme

SYMMETRIC = {"name": "gptq", "zero": "symmetric"}
SCHEME = small_scheme(64, bits=4, solver="rtn")


def test_a_zero_above_the_largest_code_is_refused(wide_model: Path, tmp_path: Path) -> None:
    serializer = {"name": "gptq", "version": 1, "zero": "symmetric"}
    folder = run(build_recipe(wide_model, tmp_path / "out", scheme=small_scheme(32, bits=4), serializer=serializer))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qzeros"].fill_(-1)  # 15 in each place, and version 1 stores zeros less one
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.up_proj: a zero is above the largest code, 15"):
        list(verify(folder))


def test_settings_of_gptq_name_the_layers_that_vllm_fuses(wide_model: Path, tmp_path: Path) -> None:
    own = [{"match": r".*\.(up|gate)_proj", "grouper": {"name": "contiguous", "size": 32}}]
    recipe = build_recipe(wide_model, tmp_path / "out", scheme=SCHEME, serializer=SYMMETRIC, overrides=own)
    settings = json.loads((run(recipe) / "config.json").read_text())["quantization_config"]
    patterns = [pattern.removeprefix("+:") for pattern in settings["dynamic"] if pattern.startswith("+:")]
    for name, count in (("gate_proj", 1), ("up_proj", 1), ("gate_up_proj", 1), ("down_proj", 0), ("qkv_proj", 0)):
        assert sum(bool(re.match(pattern, f"model.layers.0.mlp.{name}")) for pattern in patterns) == count
