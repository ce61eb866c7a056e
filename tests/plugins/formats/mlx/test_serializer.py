"""Results in the format of mlx-lm: mlx and mlx-lm read their weights and compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import run
from dashq.results.convert import convert
from dashq.results.verify import verify
from dashq.runtime.quantizer import build_serializer
from pico import EVEN, pico_model
from recipes import build_recipe, small_scheme


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model("llama", tmp_path_factory.mktemp("model"), torch.float16, **EVEN)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx_lm_computes_with_the_files(bits: int, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    own = [{"match": ".*v_proj", "bits": 8, "grouper": {"name": "contiguous", "size": 64}}]
    own += [{"match": ".*1.mlp.up_proj", "skip": True}]
    folder = run(
        build_recipe(model, tmp_path / "out", scheme=small_scheme(32, bits=bits), serializer="mlx", overrides=own)
    )
    for program in ("mlx", "mlx-lm"):
        assert all(check.passed for check in verify(folder, program))


ROPE = {"rope_type": "default", "rope_theta": 300.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rope_parameters": ROPE}),
        ("llama-untied-biased", {"rope_parameters": ROPE | LLAMA3 | {"original_max_position_embeddings": 16}}),
        ("mistral", {"rope_parameters": ROPE, "sliding_window": None}),
        ("qwen2", {"rope_parameters": ROPE}),
        ("qwen3", {"rope_parameters": ROPE}),
        (
            "gemma3",
            {"query_pre_attn_scalar": 16, "rope_parameters": {"full_attention": LINEAR, "sliding_attention": ROPE}},
        ),
    ],
)
def test_mlx_lm_turns_heads_as_the_model_does(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    model = pico_model(family, tmp_path / "model", torch.float16, **(EVEN | changes))
    folder = run(build_recipe(model, tmp_path / "out", scheme=small_scheme(32, bits=4), serializer="mlx"))
    assert all(check.passed for check in verify(folder, "mlx-lm"))
    back = convert(folder, build_serializer({"name": "dashq"}), tmp_path / "back")
    configs = [json.loads((one / "config.json").read_text()) for one in (model, back)]
    assert configs[0]["rope_parameters"] == configs[1]["rope_parameters"]
