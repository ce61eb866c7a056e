"""A result opens in transformers with packed weights, is saved again, and is refused where it cannot be unpacked."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dashq import (
    CheckpointError,
    Curvature,
    DashqLinear,
    Diagonal,
    Grouper,
    Grouping,
    hookimpl,
    load_registry,
    make_plan,
    run,
)
from dashq.measuring.evaluate import load_model
from dashq.quantizing.opening import open_model
from dashq.solving.arithmetic import round_to_nearest
from family_results import FamilyResults
from recipes import build_recipe, small_scheme

IDS = torch.arange(20)[None]


class MirrorGrouper(Grouper):
    """Groups of 16 columns, the last column first."""

    name = "mirror"
    reorders = True

    def size_for(self, columns: int) -> int:
        return 16

    def group(self, weight: Tensor, curvature: Curvature) -> Grouping:
        return Grouping(columns=weight.shape[1], size=16, order=torch.arange(weight.shape[1]).flip(0))


WITH_MIRROR = load_registry(SimpleNamespace(dashq_groupers=hookimpl(lambda: [MirrorGrouper])))


@pytest.fixture(scope="module")
def original(families: FamilyResults) -> Path:
    return families.model("llama-untied-biased")


@pytest.fixture(scope="module")
def result(families: FamilyResults) -> Path:
    return families.result("llama-untied-biased")


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.requires_grad_(False)


def test_memory_is_the_planned_bytes(original: Path, result: Path) -> None:
    recipe = build_recipe(original, original.with_name("plan"))
    plans = {plan.layer.name: plan for plan in make_plan(recipe, open_model(recipe).layers())}
    model, plain = opened(result), opened(original)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DashqLinear)}
    assert layers.keys() == plans.keys()
    for name, layer in layers.items():
        assert sum(buffer.nbytes for buffer in layer.buffers()) == plans[name].bytes
    weights = sum(plain.get_submodule(name).get_parameter("weight").nbytes for name in layers)
    packed = sum(plan.bytes for plan in plans.values())
    assert model.get_memory_footprint() == plain.get_memory_footprint() - weights + packed


def test_a_loaded_result_saves_and_opens_with_the_same_bytes_and_logits(result: Path, tmp_path: Path) -> None:
    model = opened(result)
    model.save_pretrained(tmp_path)
    assert torch.equal(opened(tmp_path)(IDS).logits, model(IDS).logits)
    saved, written = opened(tmp_path).state_dict(), opened(result).state_dict()
    assert saved.keys() == written.keys()
    assert all(saved[name].dtype == tensor.dtype and saved[name].equal(tensor) for name, tensor in written.items())


def test_a_result_opens_with_plain_weights_when_its_configuration_says_so(result: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(result)
    config.quantization_config["dequantize"] = True
    plain = AutoModelForCausalLM.from_pretrained(result, config=config).requires_grad_(False)
    assert not any(isinstance(module, DashqLinear) for module in plain.modules())
    assert torch.equal(plain(IDS).logits, opened(result)(IDS).logits)
    plain.save_pretrained(tmp_path)  # an ordinary checkpoint now
    assert torch.equal(opened(tmp_path)(IDS).logits, plain(IDS).logits)
    assert not any(isinstance(module, DashqLinear) for module in opened(tmp_path).modules())


def test_reordered_columns_survive_the_file(original: Path, tmp_path: Path) -> None:
    scheme = small_scheme(grouper="mirror", solver="rtn", bits=8)
    recipe = build_recipe(original, tmp_path / "out", WITH_MIRROR, scheme=scheme)
    plans = make_plan(recipe, open_model(recipe).layers())
    model, plain = opened(run(recipe)), opened(original)
    for plan in plans:
        layer, weight = model.get_submodule(plan.layer.name), plain.get_parameter(f"{plan.layer.name}.weight")
        assert isinstance(layer, DashqLinear)
        grouping = MirrorGrouper().group(weight, Diagonal(torch.ones(weight.shape[1])))
        expected = round_to_nearest(grouping.split(weight), plan.grid, grouping)
        assert torch.equal(layer.weight, expected.dequantize())
        assert sum(buffer.nbytes for buffer in layer.buffers()) == plan.bytes


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "this checkpoint has format version 2; this dashq reads version 1"),
        ({"version": None}, "this checkpoint has format version None"),
        ({"serializer": None}, "`serializer` must be an object with a `name`, not None"),
        ({"serializer": {"dtype": "float16"}}, "`serializer` must be an object with a `name`"),
        (
            {"serializer": {"name": "dasq"}},
            "packed by the serializer 'dasq', which is not installed. Did you mean 'dashq'. Installed: .*dash",
        ),
        (
            {"serializer": {"name": "dashq", "dtype": "int4"}},
            "serializer: dtype: should be 'float16' or 'bfloat16', not 'int4'",
        ),
        ({"serializer": {"name": "dashq", "dtype": "bfloat16"}}, f"does not fit {Q}.scale: .*bfloat16 .*float16"),
        ({"layers": None}, "layers: Input should be a valid dictionary"),
        ({"layers": {Q: {"bits": 3}}}, f"layers: {Q}.size: this entry is missing"),
        ({"layers": {Q: {"bits": 3, "size": 0}}}, f"layers: {Q}.size: should be greater than 0, not 0"),
        ({"layers": {Q: {"bits": 3, "size": 16, "sise": 1}}}, f"layers: {Q}.sise: unknown key 'sise'"),
        ({"layers": {Q: {"bits": 9, "size": 16}}}, f"{Q}: the dashq format holds 1 to 8 bits, not 9"),
        ({"layers": {Q: {"bits": 2, "size": 16}}}, rf"does not fit {Q}.codes: .* \[48, 12\], .* hold .*\[48, 18\]"),
        ({"layers": {Q: {"bits": 3, "size": 8}}}, rf"does not fit {Q}.scale: .* \[48, 6\], .* hold .*\[48, 3\]"),
        ({"layers": {Q: {"bits": 3, "size": 16}}}, "does not list .*k_proj, but the files hold its codes, offset"),
        ({"layers": {"lm_head": {"bits": 3, "size": 16}}}, "lm_head is quantized, but the files hold no lm_head.codes"),
        ({"layers": {f"{Q}x": {"bits": 3, "size": 16}}}, f"the model has no layer '{Q}x'. Did you mean '{Q}'?"),
        ({"layers": {"model.norm": {"bits": 3, "size": 16}}}, "model.norm is a LlamaRMSNorm, not a linear layer"),
    ],
)
def test_a_result_that_cannot_be_unpacked_says_why(
    changes: dict[str, object], message: str, result: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(result, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    entries: dict[str, object] = config["quantization_config"]
    entries |= changes
    absent = {key: value for key, value in entries.items() if value is not None}  # None stands for a missing key
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": absent}))
    with pytest.raises(CheckpointError, match=rf"quantization_config in config\.json.*{message}"):
        opened(folder)
    with pytest.raises(CheckpointError, match=rf"{folder} cannot be opened: .*{message}"):
        load_model(str(folder))
