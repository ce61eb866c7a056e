"""Models to be broken: changing one tensor of several shards, and what a run then says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from dashq import CheckpointError, run
from recipes import build_recipe

DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"
INDEX = "model.safetensors.index.json"


def refusal(model: Path) -> str:
    """What a run says that refuses a model."""
    with pytest.raises(CheckpointError) as error:
        run(build_recipe(model, model.with_name("out")))
    return str(error.value)


def is_untouched(output: Path) -> bool:
    """Nothing was written."""
    return not output.exists() or not any(output.iterdir())


def shard_of(model: Path, tensor: str) -> Path:
    """The file that holds a tensor."""
    name: str = json.loads((model / INDEX).read_text())["weight_map"][tensor]
    return model / name


def change(model: Path, name: str, mend: Callable[[dict[str, Tensor]], object]) -> Path:
    """Change the shard that holds a tensor; returns the shard's path."""
    path = shard_of(model, name)
    tensors = load_file(path)
    mend(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return path
