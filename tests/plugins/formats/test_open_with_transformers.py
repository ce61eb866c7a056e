"""Formats that transformers opens keep the weights in the model's own type, and others are refused."""

from pathlib import Path

import pytest
import torch

from dashq import PlanError, run
from dashq.results.verify import verify
from pico import EVEN, pico_model
from recipes import build_recipe, small_scheme


@pytest.mark.parametrize("name", ["metal", "compressed-tensors"])
@pytest.mark.parametrize(("model", "other"), [("float16", "bfloat16"), ("bfloat16", "float16"), ("float32", "float16")])
def test_scales_that_transformers_would_round_are_refused_with_the_way_out(
    name: str, model: str, other: str, tmp_path: Path
) -> None:
    folder = pico_model("llama", tmp_path / "model", getattr(torch, model), **EVEN)
    serializer = {"name": name, "dtype": other}
    with pytest.raises(PlanError, match=rf"take the format `{{name: {name}, dtype: {model}}}`, as"):
        run(build_recipe(folder, tmp_path / "out", scheme=small_scheme(32, bits=4), serializer=serializer))


@pytest.mark.parametrize("name", ["metal", "compressed-tensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_transformers_reads_the_same_weights_in_models_of_every_type(name: str, dtype: str, tmp_path: Path) -> None:
    if name == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    folder = pico_model("llama", tmp_path / "model", getattr(torch, dtype), **EVEN)
    serializer = {"name": name, "dtype": dtype}
    recipe = build_recipe(folder, tmp_path / "out", scheme=small_scheme(32, bits=4), serializer=serializer)
    assert all(check.passed for check in verify(run(recipe), "transformers"))
