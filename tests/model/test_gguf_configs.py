"""Configurations that are made of a GGUF file say what the model's own says, also where sizes differ by layer."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import run
from dashq.model.gguf_configs import build_config
from dashq.model.loading import read_config, read_tokenizer
from dashq.model.location import Location
from dashq.results.checkpoint import open_checkpoint
from gguf_results import FAMILIES, SIZES, recipe
from pico import pico_model, pico_tokenizer

# What a file does not say, and what says as much for all layers as one number.
UNSAID = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "initializer_range", "pad_token_id"),
    *("mamba_chunk_size", "chunk_size"),  # by which only the time that it takes changes
}


def settings(location: Location) -> dict[str, Any]:
    """All that a configuration says and a file can say."""
    config = read_config(location)
    # Our tables of sizes give some models what their configurations do not have.
    known = {name: value for name, value in config.to_dict().items() if hasattr(type(config), name)}
    return {name: value for name, value in known.items() if name not in UNSAID}


@pytest.mark.parametrize(
    "family",
    [
        *("mixtral", "gpt_oss", "gemma4", "gemma4-shared", "gemma4-mixture"),
        *("qwen3_next", "qwen3_5", "qwen3_5_moe"),
        *("granite4", "granite4-turned"),
        *("mamba", "falcon_mamba", "mamba2", "bamba", "falcon_h1-plain"),
    ],
)
def test_the_configuration_is_that_of_the_model(family: str, tmp_path: Path) -> None:
    base, changes = FAMILIES[family]
    model = pico_model(base, tmp_path / "model", torch.float16, **(SIZES | changes))
    out = run(recipe(model, tmp_path / "out"))
    (tmp_path / "alone").mkdir()  # with a tokenizer beside it transformers would take that
    file = Location(Path(shutil.copy(out / "model.gguf", tmp_path / "alone")).parent, "model.gguf")
    expected, entries = settings(Location(model)), settings(file)
    if "head_dim" in expected:
        expected["head_dim"] = expected["head_dim"] or 16
    assert entries.keys() >= expected.keys()
    rounded = {name: pytest.approx(value) for name, value in expected.items() if isinstance(value, float)}
    assert {name: entries[name] for name in expected} == expected | rounded
    assert read_tokenizer(file).encode("while x:") == pico_tokenizer().encode("while x:")
    assert open_checkpoint(out).config().model_type == expected["model_type"]


def test_transformers_makes_the_configuration_of_any_other_file(tmp_path: Path) -> None:
    out = run(recipe(pico_model("llama", tmp_path / "model", torch.float16, **SIZES), tmp_path / "out"))
    assert build_config(out / "model.gguf") is None
