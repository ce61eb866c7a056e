"""What vLLM makes of results: how its weights are found, and, where it is installed, that they are ours."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dashq import run
from dashq.programs import Opened
from dashq.results.checkpoint import open_network
from dashq.results.verify import verify
from dashq_plugins.formats.gptq import GptqSerializer
from dashq_plugins.formats.vllm import multiplied_weight
from pico import WIDE, pico_model
from recipes import build_recipe

SYMMETRIC = {"name": "gptq", "zero": "symmetric"}


def scheme(size: int = 64) -> dict[str, Any]:
    return {
        "bits": 4,
        "estimator": "diagonal",
        "grouper": {"name": "contiguous", "size": size},
        "solver": "rtn",
    }


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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model("llama", tmp_path_factory.mktemp("model"), torch.float16, **WIDE)


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (1.2, False)])
def test_logits_may_differ_by_what_computing_in_the_programs_type_changes(
    factor: float, passed: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(build_recipe(model, tmp_path / "out", scheme=scheme(), serializer=SYMMETRIC, certificate_groups=0))

    def program(folder: Path) -> Opened:
        network = open_network(folder, torch.bfloat16)
        return Opened(
            logits=lambda ids: network(torch.tensor([ids])).logits[0].float() * factor,
            logits_tolerance=0.0,
            computes_in=torch.bfloat16,
        )

    monkeypatch.setattr(GptqSerializer, "programs", {"abacus": program})
    check = list(verify(folder, "abacus"))[-1]
    assert check.difference > 0
    assert check.passed == passed


OWN = [
    {"match": r".*\.(q|k|v)_proj", "grouper": {"name": "contiguous", "size": 32}},
    {"match": r".*layers\.1\.mlp\.(up|gate)_proj", "skip": True},
]


def test_settings_of_gptq_name_the_layers_that_vllm_fuses(model: Path, tmp_path: Path) -> None:
    own = [{"match": r".*\.(up|gate)_proj", "grouper": {"name": "contiguous", "size": 32}}]
    recipe = build_recipe(
        model, tmp_path / "out", scheme=scheme(), serializer=SYMMETRIC, overrides=own, certificate_groups=0
    )
    settings = json.loads((run(recipe) / "config.json").read_text())["quantization_config"]
    patterns = [pattern.removeprefix("+:") for pattern in settings["dynamic"] if pattern.startswith("+:")]
    for name, count in (("gate_proj", 1), ("up_proj", 1), ("gate_up_proj", 1), ("down_proj", 0), ("qkv_proj", 0)):
        assert sum(bool(re.match(pattern, f"model.layers.0.mlp.{name}")) for pattern in patterns) == count


@pytest.mark.filterwarnings("ignore")  # vLLM's own
@pytest.mark.parametrize("overrides", [[], OWN], ids=["alike", "mixed"])
@pytest.mark.parametrize("serializer", [SYMMETRIC, "compressed-tensors", "integer"], ids=str)
def test_vllm_multiplies_with_our_weights(serializer: Any, overrides: list[Any], model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    if serializer == "integer":
        serializer = {"name": "compressed-tensors", "zero": "integer"}
    folder = run(
        build_recipe(
            model, tmp_path / "out", scheme=scheme(), serializer=serializer, overrides=overrides, certificate_groups=0
        )
    )
    checks = list(verify(folder, "vllm"))
    assert {check.name for check in checks if check.against == "vllm"} >= {"logits", "model.layers.0.self_attn.q_proj"}
    assert all(check.passed for check in checks)
