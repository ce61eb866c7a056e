"""Float8 weights are read as the values that they stand for with their scales; all other kinds are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from broken_models import is_untouched, refusal
from commands import call
from dashq import CheckpointError, run
from dashq.model.decoder import Model
from dashq.model.float8 import scaled
from dashq.quantizing.opening import open_model
from dashq.results.checkpoint import open_checkpoint
from pico import WIDE, pico_model
from recipes import build_recipe, mixture_recipe, small_recipe, small_scheme, write_recipe

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
Q = "model.layers.0.self_attn.q_proj.weight"
Scales = Callable[[Tensor], Tensor]


def grouped(**rule: Any) -> dict[str, Any]:
    weights = {"type": "float", "num_bits": 8, "symmetric": True, **rule}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }


def expanded(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """The scale of each weight."""
    whole = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return whole[..., : shape[-2], : shape[-1]]


def block_scales(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """One scale for each block, the last ones for less, so that the largest weight of each is the largest float8."""
    rows = [part.split(block[1], -1) for part in weight.float().split(block[0], -2)]
    return torch.stack([torch.stack([part.abs().amax((-2, -1)) for part in row], -1) for row in rows], -2) / 448


def in_float8(model: Path, settings: dict[str, Any], end: str, block: tuple[int, int]) -> dict[str, Tensor]:
    """Write the linear layers of a model in float8, with scales and settings; returns the values they stand for."""
    tensors, values = load_file(model / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if name.endswith(("_proj.weight", "mqa.weight")):
            scale = block_scales(weight, block)
            every = expanded(scale, block, weight.shape)
            tensors[name] = (weight.float() / every).to(torch.float8_e4m3fn)
            tensors[name + end] = scale
            values[name] = (tensors[name].float() * every).to(torch.bfloat16)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    configure(model, dtype="bfloat16", quantization_config=settings)
    return values


def configure(model: Path, **entries: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | entries))


def read_all(model: Model) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    with model.outside() as outside:
        tensors |= outside
    for block in model.walk():
        tensors |= block.tensors
    return tensors


def wide_model(folder: Path, **sizes: Any) -> Path:
    return pico_model("llama", folder, torch.bfloat16, **(WIDE | sizes))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_blocks_with_a_scale_are_read_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    model = pico_model(family, tmp_path / "model", torch.bfloat16, **WIDE, moe_intermediate_size=128)
    in_float8(model, FP8, "_scale_inv", (128, 128))
    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).state_dict()
    tensors = read_all(open_model(mixture_recipe(model, tmp_path / "out")))
    assert len(tensors) > 15
    for name, tensor in tensors.items():
        assert tensor.dtype is torch.bfloat16
        assert tensor.equal(opened[name]), name


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "mixtral"])
def test_blocks_at_the_ends_may_be_smaller(family: str, tmp_path: Path) -> None:
    model = pico_model(family, tmp_path / "model", torch.bfloat16)
    settings = FP8 | {"weight_block_size": [32, 32]}
    values = in_float8(model, settings, "_scale_inv", (32, 32))
    plain = pico_model(family, tmp_path / "plain", torch.bfloat16)
    tensors = load_file(plain / "model.safetensors")
    save_file(tensors | values, plain / "model.safetensors", metadata={"format": "pt"})
    read, expected = (read_all(open_model(mixture_recipe(folder, tmp_path / "out"))) for folder in (model, plain))
    assert read.keys() == expected.keys()
    assert all(read[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("rule", "block"),
    [
        ({"strategy": "tensor"}, (512, 512)),
        ({"strategy": "channel"}, (1, 512)),
        ({"strategy": "block", "block_structure": [64, 128]}, (64, 128)),
        ({"strategy": "group", "group_size": 32}, (1, 32)),
    ],
    ids=lambda value: str(value.get("strategy")) if isinstance(value, dict) else "",
)
def test_float_quantized_weights_are_read_as_compressed_tensors_dequantizes_them(
    rule: dict[str, Any], block: tuple[int, int], tmp_path: Path
) -> None:
    model = wide_model(tmp_path / "model")
    in_float8(model, grouped(**rule), "_scale", block)
    held = load_file(model / "model.safetensors")
    arguments = QuantizationArgs(type=QuantizationType.FLOAT, num_bits=8, **rule)
    tensors = read_all(open_model(build_recipe(model, tmp_path / "out")))
    for name, weight in held.items():
        if weight.dtype is torch.float8_e4m3fn:
            scale = held[f"{name}_scale"]
            expected = dequantize(weight, scale.squeeze() if scale.numel() == 1 else scale, args=arguments)
            assert tensors[name].equal(expected.to(torch.bfloat16)), name


def test_one_scale_for_each_row_is_read_of_plain_weights_and_of_stacks_of_experts(tmp_path: Path) -> None:
    model = pico_model("llama4", tmp_path / "model", torch.bfloat16)
    held, values = load_file(model / "model.safetensors"), {}
    for name, weight in list(held.items()):
        if name.endswith(("gate_up_proj", "experts.down_proj", "o_proj.weight")):
            dim = -1 if name.endswith("weight") else -2
            scale = weight.float().abs().amax(dim, keepdim=True) / 448
            held[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            held[f"{name}_scale"] = scale
            values[name] = (held[name].float() * scale).to(torch.bfloat16)
    assert {values[name].dim() for name in values} == {2, 3}
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    configure(model, dtype="bfloat16", quantization_config={"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200})
    tensors = read_all(open_model(mixture_recipe(model, tmp_path / "out")))
    for name, value in values.items():
        assert tensors[name].equal(value), name


def test_scales_may_be_powers_of_two_and_one_number(tmp_path: Path) -> None:
    weight = torch.randn(3, 4).to(torch.float8_e5m2)
    assert scaled(weight, torch.tensor([[4.0]]).to(torch.float8_e8m0fnu), (2, 2)).equal(weight.float() * 4)
    assert scaled(weight, torch.tensor(0.5), None).equal(weight.float() / 2)


def test_blocks_of_a_stack_of_experts_have_scales_of_their_own() -> None:
    weight, scale = torch.randn(3, 5, 7).to(torch.float8_e4m3fn), torch.rand(3, 2, 4)
    values = scaled(weight, scale, (4, 2))
    for expert, row, column in [(0, 0, 0), (1, 3, 1), (2, 4, 6)]:
        expected = float(weight[expert, row, column]) * float(scale[expert, row // 4, column // 2])
        assert float(values[expert, row, column]) == pytest.approx(expected)


def test_a_result_holds_nothing_of_the_settings_of_its_source_and_plan_names_what_was_read(tmp_path: Path) -> None:
    model = wide_model(tmp_path / "model")
    values = in_float8(model, FP8, "_scale_inv", (128, 128))
    tensors = load_file(model / "model.safetensors")
    inputs = {name.replace("weight", "input_scale"): torch.ones(1) for name in values}
    save_file(tensors | inputs, model / "model.safetensors", metadata={"format": "pt"})
    note = "14 float8 weights are multiplied with their scales and read as bfloat16"
    scheme = small_scheme(32, bits=8, solver="rtn")
    recipe = write_recipe(tmp_path / "recipe.yaml", small_recipe(model, tmp_path / "out", scheme=scheme))
    assert note in " ".join(call("plan", recipe).output.split())
    settings = {"name": "compressed-tensors", "dtype": "bfloat16"}
    out = run(build_recipe(model, tmp_path / "out", scheme=scheme, serializer=settings))
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert config["dtype"] == "bfloat16"
    assert not {"weight_block_size", "fmt", "activation_scheme"} & config["quantization_config"].keys()
    weight = open_checkpoint(out).quantized(Q.removesuffix(".weight")).dequantize()
    assert float((weight - values[Q].float()).norm() / values[Q].float().norm()) < 0.01
    assert not [name for name in load_file(out / "model.safetensors") if "inv" in name or "input_scale" in name]


def test_settings_under_their_earlier_name_are_found(tmp_path: Path) -> None:
    model = wide_model(tmp_path / "model")
    in_float8(model, FP8, "_scale", (128, 128))
    config = json.loads((model / "config.json").read_text())
    del config["quantization_config"]
    settings = grouped(strategy="block", block_structure=[128, 128])
    (model / "config.json").write_text(json.dumps(config | {"compression_config": settings}))
    assert open_model(build_recipe(model, tmp_path / "out")).warnings[0].startswith("14 float8 weights")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is already quantized (gptq)"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "is already quantized (modelopt)"),
        (grouped() | {"format": "pack-quantized"}, "is already quantized (compressed-tensors, pack-quantized)"),
        ([1], "holds no readable config.json"),
        ({"bits": 4}, "is already quantized (an unknown method)"),
        (grouped(num_bits=4), "weights of 4 bits cannot be read"),
        (grouped() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights (sparse-24-bitmask)"),
        (grouped() | {"transform_config": {"config_groups": {"R1": {}}}}, "turned weights cannot be read"),
        (FP8 | {"weight_block_size": [0, 128]}, "blocks of [0, 128] cannot be read"),
        (grouped() | {"config_groups": {"a": {"weights": 7}}}, "cannot be read"),
    ],
)
def test_other_kinds_are_refused_with_a_way_out(settings: Any, words: str, tmp_path: Path) -> None:
    model = wide_model(tmp_path / "model", hidden_size=32, intermediate_size=32)
    configure(model, quantization_config=settings)
    message = refusal(model)
    assert words in message
    assert "\n" not in message
    assert is_untouched(tmp_path / "out")


def test_a_scale_that_fits_no_block_names_both_shapes(tmp_path: Path) -> None:
    model = wide_model(tmp_path / "model")
    in_float8(model, FP8, "_scale_inv", (128, 64))
    message = refusal(model)
    assert message.startswith(f"{model}: model.layers.0.mlp.down_proj.weight_scale_inv has shape [2, 8], which is no")
    assert "for a weight of shape [256, 512]: one for all, for each row, or for each block of [128, 128]" in message


def test_scales_that_are_whole_numbers_are_refused(tmp_path: Path) -> None:
    model = wide_model(tmp_path / "model")
    in_float8(model, FP8, "_scale_inv", (128, 128))
    tensors = load_file(model / "model.safetensors")
    tensors[f"{Q}_scale_inv"] = tensors[f"{Q}_scale_inv"].to(torch.uint8)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert f"{Q}_scale_inv is of type uint8 where a scale is a floating-point number" in refusal(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64])
@pytest.mark.parametrize("configured", [True, False])
def test_weights_that_are_no_floating_point_numbers_are_refused(
    dtype: torch.dtype, configured: bool, tmp_path: Path
) -> None:
    model = wide_model(tmp_path / "model", hidden_size=32, intermediate_size=32)
    tensors = load_file(model / "model.safetensors")
    tensors[Q] = tensors[Q].to(dtype)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    if configured:
        configure(model, quantization_config=FP8)
    message = refusal(model)
    assert message.startswith(f"{model}: tensor {Q} is of type {str(dtype).removeprefix('torch.')}, without a scale")
    assert "bfloat16" in message
    assert is_untouched(tmp_path / "out")


def test_complex_weights_are_refused(tmp_path: Path) -> None:
    model = wide_model(tmp_path / "model", hidden_size=32, intermediate_size=32)
    tensors = load_file(model / "model.safetensors")
    tensors[Q] = tensors[Q].to(torch.complex64)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is of type complex64"):
        open_model(build_recipe(model, tmp_path / "out"))
