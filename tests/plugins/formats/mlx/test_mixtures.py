"""Mixtures of experts in the format of mlx-lm: names and stacks, what it computes with them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from commands import call
from dashq import PlanError, run
from dashq.results.checkpoint import open_network
from dashq.results.convert import convert
from dashq.results.verify import verify
from dashq.runtime.quantizer import build_serializer
from dashq_plugins.formats.mlx.mixtures import write_tensors
from pico import EVEN, pico_model
from recipes import PLAIN_EXPERTS, build_recipe, small_scheme

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "olmoe": {},
    "deepseek_v2": LATENT | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
}


def quantize(family: str, folder: Path, *overrides: dict[str, Any], serializer: str = "mlx", **changes: Any) -> Path:
    model = pico_model(family, folder / "model", torch.float16, **(EVEN | FAMILIES.get(family, {}) | changes))
    recipe = build_recipe(
        model,
        folder / serializer,
        scheme=small_scheme(32, bits=4, solver="rtn", router="routed"),
        serializer=serializer,
        overrides=list(overrides),
    )
    return run(recipe)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_computes_with_experts_of_several_bits(family: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    own = [{"match": ".*experts.down_proj.*", "bits": 3}, {"match": ".*o_proj", "bits": 8}]
    folder = quantize(family, tmp_path, *own)
    for program in ("mlx", "mlx-lm"):
        checks = list(verify(folder, program))
        assert all(check.passed for check in checks)
    assert any("experts.gate_up_proj.3" in check.name for check in checks)


@pytest.mark.parametrize("family", FAMILIES)
def test_mlx_lm_computes_with_experts_that_are_left_alone(family: str, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    folder = quantize(family, tmp_path, PLAIN_EXPERTS)
    assert all(check.passed for check in verify(folder, "mlx-lm"))


def test_files_and_settings_have_the_names_of_mlx_lm(tmp_path: Path) -> None:
    folder = quantize("mixtral", tmp_path, {"match": ".*experts.down_proj.*", "bits": 2})
    tensors = load_file(folder / "model.safetensors")
    mixture = "model.layers.1.block_sparse_moe"
    assert {name.removeprefix(f"{mixture}.") for name in tensors if name.startswith(mixture)} == {
        "gate.weight",
        *(
            f"switch_mlp.{part}.{key}"
            for part in ("gate_proj", "up_proj", "down_proj")
            for key in ("weight", "scales", "biases")
        ),
    }
    assert tensors[f"{mixture}.switch_mlp.up_proj.weight"].shape == (4, 96, 64 * 4 // 32)
    settings = json.loads((folder / "config.json").read_text())["quantization"]
    assert settings[f"{mixture}.switch_mlp.down_proj"] == {"group_size": 32, "bits": 2}
    assert f"{mixture}.switch_mlp.up_proj" not in settings


@pytest.mark.parametrize("plain", [[], [PLAIN_EXPERTS]])
def test_a_mixture_is_converted_to_mlx_and_back(
    plain: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = quantize("qwen3_moe", tmp_path, *plain, serializer="dashq")
    with monkeypatch.context() as patch:
        patch.setattr("dashq.results.shards.SHARD_BYTES", 1)  # the experts of a stack come from several parts
        there = convert(native, build_serializer({"name": "mlx"}), tmp_path / "there")
    assert sorted(path.name for path in there.glob("*.safetensors")) == ["model.safetensors"]
    assert call("verify", there).code == 0
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        ours, theirs = (open_network(folder, torch.float32)(ids).logits for folder in (native, there))
    assert torch.allclose(ours, theirs, atol=1e-4)
    back = convert(there, build_serializer({"name": "dashq"}), tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (native, back))
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("family", "changes", "override", "reason"),
    [
        (
            "phimoe",
            {},
            {"match": ".*q_proj", "bits": 8},
            r"model.layers.0.mlp.experts.gate_up_proj: format mlx has no names for experts of model type 'phimoe'. "
            "Known: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2. Formats that can hold it: dashq$",
        ),
        (
            "phimoe",
            {},
            PLAIN_EXPERTS,
            r"model.layers.0.mlp.experts.gate_up_proj: format mlx has no names for experts of model type 'phimoe'",
        ),
        (
            "mixtral",
            {},
            {"match": ".*experts.down_proj.3", "skip": True},
            r"model.layers.0.mlp.experts.down_proj: format mlx has one type for all 4 experts of a stack, and of these "
            "3 are quantized, to 4 bits in groups of 32",
        ),
        (
            "mixtral",
            {},
            {"match": ".*experts.gate_up_proj.1", "grouper": {"name": "contiguous", "size": 64}},
            "all 4 experts .* to 4 bits in groups of 32 and 4 bits in groups of 64",
        ),
        (
            "qwen2_moe",
            {"norm_topk_prob": True},
            PLAIN_EXPERTS,
            "mlx-lm computes models of type 'qwen2_moe' with norm_topk_prob = False, and here it is True",
        ),
        (
            "deepseek_v2",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            PLAIN_EXPERTS,
            "mlx-lm computes models of type 'deepseek_v2' with rope_type = 'yarn', and here it is 'default'",
        ),
    ],
)
def test_a_mixture_that_mlx_lm_would_not_compute_is_refused(
    family: str, changes: dict[str, Any], override: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=reason):
        quantize(family, tmp_path, override, **changes)
    assert not (tmp_path / "mlx").exists()


def test_tensors_of_every_size_and_type_lie_in_one_file(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "words": torch.arange(6, dtype=torch.int32).view(torch.uint32).view(2, 3),
        "brain": torch.randn(7).bfloat16(),
        "view": torch.randn(4, 6)[:, 1::2],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }
    write_tensors(tmp_path / "model.safetensors", tensors.items)
    contents = load_file(tmp_path / "model.safetensors")
    assert contents.keys() == tensors.keys()
    assert all(contents[name].equal(tensor) for name, tensor in tensors.items())
