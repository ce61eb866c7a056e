"""vLLM's fused layers are taken apart, and where it is installed it multiplies with the solver's weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dashq import run
from dashq.results.verify import verify
from dashq_plugins.formats.vllm import multiplied_weight
from recipes import build_recipe, small_scheme

SYMMETRIC = {"name": "gptq", "zero": "symmetric"}
SCHEME = small_scheme(64, bits=4, solver="rtn")


class Fused(nn.Module):
    """A layer as vLLM has it: several in one, with a method that multiplies."""

    def __init__(self, weight: Tensor, sizes: list[int]) -> None:
        super().__init__()
        self.input_size, self.output_partition_sizes = weight.shape[1], sizes
        self.quant_method = SimpleNamespace(apply=lambda layer, x: x @ weight.T)


@pytest.mark.parametrize(
    ("mapping", "name", "rows"),
    [
        ({"qkv_proj": ["q_proj", "k_proj", "v_proj"]}, "q_proj", slice(0, 8)),
        ({"qkv_proj": ["q_proj", "k_proj", "v_proj"]}, "k_proj", slice(8, 12)),
        ({"qkv_proj": ["q_proj", "k_proj", "v_proj"]}, "v_proj", slice(12, 16)),
        ({"qkv_proj": ["qkv_proj"]}, "qkv_proj", slice(0, 16)),
        ({}, "qkv_proj", slice(0, 16)),
    ],
)
def test_a_layer_that_is_part_of_a_fused_one_has_its_own_rows(
    mapping: dict[str, list[str]], name: str, rows: slice
) -> None:
    weight = torch.arange(96.0).view(16, 6)
    model = nn.Module()
    model.attention = nn.Module()
    model.attention.qkv_proj = Fused(weight, [8, 4, 4])
    model.packed_modules_mapping = mapping  # type: ignore[assignment]
    assert multiplied_weight(model, f"attention.{name}", torch.float32).equal(weight[rows])


OWN = [
    {"match": r".*\.(q|k|v)_proj", "grouper": {"name": "contiguous", "size": 32}},
    {"match": r".*layers\.0\.mlp\.(up|gate)_proj", "skip": True},
]


@pytest.mark.filterwarnings("ignore")  # vLLM's own
@pytest.mark.parametrize("overrides", [[], OWN], ids=["alike", "mixed"])
@pytest.mark.parametrize("serializer", [SYMMETRIC, "compressed-tensors", "integer"], ids=str)
def test_vllm_multiplies_with_our_weights(
    serializer: Any, overrides: list[Any], wide_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    if serializer == "integer":
        serializer = {"name": "compressed-tensors", "zero": "integer"}
    folder = run(build_recipe(wide_model, tmp_path / "out", scheme=SCHEME, serializer=serializer, overrides=overrides))
    checks = list(verify(folder, "vllm"))
    assert {check.name for check in checks if check.against == "vllm"} >= {"logits", "model.layers.0.self_attn.q_proj"}
    assert all(check.passed for check in checks)
