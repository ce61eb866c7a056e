"""Results in the formats of other programs: written, verified, opened again, converted, refused."""

import json
import re
import shutil
from functools import reduce
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from commands import call
from dashq import CheckpointError, PlanError, run
from dashq.results.checkpoint import build_serializer, open_checkpoint, open_network
from dashq.results.convert import convert
from dashq.results.verify import verify
from pico import WIDE, pico_model
from recipes import build_recipe

IDS = torch.arange(9)[None]
SCHEMES: dict[str, tuple[Any, int, int, str]] = {
    "dashq": ("dashq", 3, 64, "irls"),
    "mlx": ("mlx", 3, 64, "irls"),
    "metal": ("metal", 2, 64, "irls"),
    "compressed-tensors": ("compressed-tensors", 3, 64, "irls"),
    "compressed-tensors-integer": ({"name": "compressed-tensors", "zero": "integer"}, 4, 32, "irls"),
    "gptq": ("gptq", 3, 64, "irls"),
    "gptq-v1": ({"name": "gptq", "version": 1, "zero": "symmetric"}, 4, 64, "irls"),
    "dashq-packed-linear": ("dashq-packed-linear", 3, 64, "irls"),
    "Q2_K": ("gguf", 2, 16, "k_quant"),
    "Q3_K": ("gguf", 3, 16, "k_quant"),
    "Q4_K": ("gguf", 4, 32, "k_quant"),
    "Q4_1": ({"name": "gguf", "four_bits": "Q4_1"}, 4, 32, "irls"),
    "Q5_1": ("gguf", 5, 32, "irls"),
}


def scheme(bits: int, size: int, solver: str) -> dict[str, Any]:
    return {
        "bits": bits,
        "estimator": "diagonal",
        "grouper": {"name": "contiguous", "size": size},
        "solver": solver,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pico_model("llama", tmp_path_factory.mktemp("model"), torch.float16, **WIDE)
    (folder / "LICENSE").write_text("do as you like")
    return folder


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("results")
    return {
        label: run(
            build_recipe(
                model, folder / label, scheme=scheme(bits, size, solver), serializer=serializer, certificate_groups=0
            )
        )
        for label, (serializer, bits, size, solver) in SCHEMES.items()
    }


def logits(network: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = network(IDS).logits
    return result


@pytest.mark.parametrize("label", SCHEMES)
def test_every_format_holds_what_the_solver_found(label: str, results: dict[str, Path]) -> None:
    checks = list(verify(results[label]))
    assert sum(check.kind == "layers" for check in checks) == 14
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("label", SCHEMES)
def test_dashq_opens_its_results_in_every_format(label: str, model: Path, results: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(results[label])
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name in checkpoint.layers:
        plain.get_submodule(name).weight.data = checkpoint.quantized(name).dequantize()
    assert torch.allclose(logits(open_network(results[label], torch.float32)), logits(plain), atol=1e-4)


@pytest.mark.parametrize("label", SCHEMES)
def test_every_folder_is_complete(label: str, results: dict[str, Path]) -> None:
    folder = results[label]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "LICENSE"} <= names
    assert {"README.md", "recipe.yaml", "report.json"} <= names
    assert {"model.gguf"} <= names if "K" in label or "_1" in label else {"model.safetensors"} <= names
    assert not any(name.startswith("part-") or name.endswith(".unfinished") for name in names)
    card = (folder / "README.md").read_text()
    assert "bits per weight" in card
    assert "Load it with" in card or label.startswith(("dashq", "Q"))


@pytest.mark.parametrize("label", ["metal"])
def test_stock_transformers_opens_the_files_bit_by_bit(label: str, results: dict[str, Path]) -> None:
    checks = list(verify(results[label], "transformers"))
    assert all(check.passed for check in checks)
    assert {check.against for check in checks} == {"solver", "format", "transformers"}
    assert checks[-1].name == "logits"


@pytest.mark.parametrize("label", ["compressed-tensors", "compressed-tensors-integer"])
def test_transformers_opens_compressed_tensors(label: str, results: dict[str, Path]) -> None:
    pytest.importorskip("compressed_tensors")
    assert all(check.passed for check in verify(results[label], "transformers"))


@pytest.mark.parametrize("label", ["Q2_K", "Q3_K", "Q4_K", "Q4_1", "Q5_1"])
def test_the_gguf_package_dequantizes_the_blocks_bit_by_bit(label: str, results: dict[str, Path]) -> None:
    assert all(check.passed for check in verify(results[label], "gguf"))
    reader = gguf.GGUFReader(results[label] / "model.gguf")
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if tensor.name.endswith("ffn_down.weight")}
    assert kinds == {label}


def test_an_independent_reader_of_the_authors_layout_finds_the_same_weights(results: dict[str, Path]) -> None:
    folder = results["dashq-packed-linear"]
    tensors = load_file(folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    for name, entry in json.loads((folder / "dashq_config.json").read_text()).items():
        per_word = 32 // entry["nbits"]
        codes = []
        for word in tensors[f"{name}.W_q_packed"].tolist():
            word &= 0xFFFFFFFF
            codes += [word >> entry["nbits"] * place & (1 << entry["nbits"]) - 1 for place in range(per_word)]
        groups = torch.tensor(codes[: entry["num_groups"] * entry["group_size"]]).view(-1, entry["group_size"])
        zero, scale = (tensors[f"{name}.{key}"].float() for key in ("zero", "scale"))
        weight = ((groups - zero) * scale).view(-1, entry["quant_in_features"])[:, : entry["in_features"]]
        assert weight.equal(checkpoint.quantized(name).dequantize())


def test_a_checkpoint_in_the_authors_layout_opens_without_our_own_files(
    results: dict[str, Path], tmp_path: Path
) -> None:
    ours = results["dashq-packed-linear"]
    theirs = shutil.copytree(ours, tmp_path / "theirs", ignore=shutil.ignore_patterns("report.json", "recipe.yaml"))
    assert torch.equal(logits(open_network(theirs, torch.float32)), logits(open_network(ours, torch.float32)))


@pytest.mark.parametrize(("size", "bits", "to"), [(64, 3, "mlx"), (64, 2, "metal"), (32, 5, "gguf")])
def test_what_loses_nothing_is_converted(size: int, bits: int, to: str, model: Path, tmp_path: Path) -> None:
    native = run(build_recipe(model, tmp_path / "native", scheme=scheme(bits, size, "irls"), certificate_groups=0))
    outcome = call("convert", native, "--to", to, "--output", tmp_path / "new")
    assert outcome.code == 0, outcome.errors
    assert call("verify", tmp_path / "new").code == 0
    there, here = open_checkpoint(tmp_path / "new"), open_checkpoint(native)
    for name in here.layers:
        assert there.quantized(name).dequantize().equal(here.quantized(name).dequantize())
    assert there.others()
    back = convert(tmp_path / "new", build_serializer({"name": "dashq"}), tmp_path / "back")
    assert load_file(back / "model.safetensors").keys() == load_file(native / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("gptq", "its zeros are integer, and these are real"),
        ("gguf", "its scales and offsets are multiples of a super-block's unit, and these are not"),
        ("dashq-packed-linear", "it stores zeros as torch.float16, and these zeros are others"),
    ],
)
def test_what_would_lose_is_refused_with_what_has_to_be_solved_again(
    to: str, reason: str, results: dict[str, Path], tmp_path: Path
) -> None:
    outcome = call("convert", results["metal"], "--to", to, "--output", tmp_path / "new")
    assert outcome.code == 2
    assert "these layers would have to be solved again" in outcome.errors
    assert reason in outcome.errors
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("serializer", "bits", "size", "solver", "reason"),
    [
        ("metal", 3, 64, "irls", "format metal holds 2, 4, 8 bits, not 3. Formats that can hold such a layer: .*mlx"),
        ("mlx", 2, 16, "irls", "format mlx holds groups of 32, 64 or 128, not 16. Formats that can hold .*dashq"),
        ("gguf", 2, 64, "k_quant", r"\(Q2_K\) needs groups of 16 and a multiple of 256 columns"),
        ("gguf", 2, 16, "closed_form", "solver 'closed_form' cannot work .* Solvers that can: k_quant"),
        ("dashq", 2, 16, "k_quant", "solver 'k_quant' works on super-blocks alone"),
        ({"name": "gptq", "version": 1}, 4, 64, "irls", "version 1 cannot hold every whole zero"),
    ],
)
def test_the_plan_refuses_what_a_format_cannot_hold(
    serializer: Any, bits: int, size: int, solver: str, reason: str, model: Path, tmp_path: Path
) -> None:
    recipe = build_recipe(model, tmp_path / "out", scheme=scheme(bits, size, solver), serializer=serializer)
    with pytest.raises(PlanError, match=reason):
        run(recipe)
    assert not (tmp_path / "out").exists()


def test_metal_refuses_two_settings_and_names_the_layer(model: Path, tmp_path: Path) -> None:
    override = [{"match": ".*layers.1.mlp.down_proj", "bits": 4}]
    recipe = build_recipe(model, tmp_path / "out", scheme=scheme(2, 64, "irls"), overrides=override, serializer="metal")
    with pytest.raises(PlanError, match=r"model.layers.1.mlp.down_proj: format metal has one setting"):
        run(recipe)


def test_the_plan_warns_of_fused_layers_that_differ(model: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(model),
        "output": str(tmp_path / "out"),
        "calibration": {"dataset": "pydoc", "samples": 1, "sequence_length": 16},
        "scheme": scheme(4, 64, "irls"),
        "overrides": [{"match": ".*layers.0.self_attn.v_proj", "bits": 8}],
        "serializer": "compressed-tensors",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    outcome = call("plan", tmp_path / "recipe.yaml")
    assert outcome.code == 0, outcome.errors
    told = " ".join(outcome.output.split())
    assert told.count("runtimes that fuse these layers want them quantized alike") == 1
    assert "model.layers.0.self_attn.v_proj 8 bits in groups of 64" in told


@pytest.mark.parametrize("label", ["mlx", "gptq", "compressed-tensors", "dashq-packed-linear", "Q2_K"])
def test_truncated_files_are_told(label: str, results: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(results[label], tmp_path / "cut")
    path = next(path for path in folder.iterdir() if path.name in ("model.safetensors", "model.gguf"))
    path.write_bytes(path.read_bytes()[:-1000])
    outcome = call("verify", folder)
    assert outcome.code == 2
    assert "truncated" in outcome.errors


def changed(folder: Path, target: Path, name: str, change: Any) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, target / "model.safetensors")
    return target


LAYER = "model.layers.0.mlp.up_proj"


def test_a_changed_number_is_a_difference(results: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(results["mlx"], tmp_path / "x", f"{LAYER}.scales", lambda scales: scales * 2)
    outcome = call("verify", folder)
    assert outcome.code == 1
    assert f"{LAYER} from solver" in outcome.output


@pytest.mark.parametrize(
    ("label", "file", "keys"),
    [
        ("dashq", "config.json", ["quantization_config", "layers", "model.layers.0.mlp.up_proj", "bits"]),
        ("mlx", "config.json", ["quantization", "group_size"]),
        ("metal", "config.json", ["quantization_config", "quant_method"]),
        ("compressed-tensors", "config.json", ["quantization_config", "format"]),
        ("gptq", "config.json", ["quantization_config", "bits"]),
        ("gptq", "quantize_config.json", ["checkpoint_format"]),
    ],
)
def test_a_changed_or_missing_setting_is_a_difference_and_an_added_one_is_none(
    label: str, file: str, keys: list[str], results: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(results[label], tmp_path / "copy"))
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {"added": 1}))
    assert all(check.passed for check in verify(folder))
    owner = reduce(lambda inner, key: inner[key], keys[:-1], content)
    for other in ({keys[-1]: "other"}, {}):
        owner.pop(keys[-1])
        owner.update(other)
        (folder / file).write_text(json.dumps(content))
        failed = [check for check in verify(folder) if not check.passed]
        assert [(check.kind, check.name) for check in failed] == [("settings", " ".join([file, *keys]))]


def test_a_tensor_of_a_wrong_shape_type_or_value_is_named(results: dict[str, Path], tmp_path: Path) -> None:
    cases = [
        (
            "mlx",
            "scales",
            lambda x: x[:5].clone(),
            f"{LAYER}.scales is torch.float16 \\[5, 4\\] where format 'mlx' needs",
        ),
        ("mlx", "scales", lambda x: x.float(), f"{LAYER}.scales is torch.float32"),
        ("mlx", "scales", lambda x: None, f"lacks the tensor {LAYER}.scales"),
        ("mlx", "biases", lambda x: x * float("nan"), f"{LAYER}: a scale or offset is not a finite number"),
        ("dashq-packed-linear", "W_q_packed", lambda x: x | 1 << 30, "codes out of range"),
        ("gptq", "g_idx", lambda x: x.flip(0).clone(), r"its columns are in another order \(g_idx\)"),
    ]
    for number, (label, key, change, message) in enumerate(cases):
        folder = changed(results[label], tmp_path / str(number), f"{LAYER}.{key}", change)
        with pytest.raises(CheckpointError, match=message):
            list(verify(folder))


def test_foreign_unfinished_and_unknown_results_are_told(results: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is no finished result of dashq: it has no report\.json"):
        open_checkpoint(tmp_path)
    folder = shutil.copytree(results["mlx"], tmp_path / "unknown")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"serializer": {"name": "papyrus"}}))
    with pytest.raises(CheckpointError, match="packed by the serializer 'papyrus', which is not installed"):
        open_checkpoint(folder)
    (tmp_path / "dashq_config.json").write_text('{"layer": {"nbits": 5}}')
    with pytest.raises(CheckpointError, match="does not describe packed layers"):
        open_checkpoint(tmp_path)


def test_a_program_that_is_unknown_or_missing_is_told(results: dict[str, Path]) -> None:
    outcome = call("verify", results["metal"], "--with", "abacus")
    assert outcome.code == 2
    assert "knows no program 'abacus'. Programs: transformers" in outcome.errors


def test_formats_lists_every_format(results: dict[str, Path]) -> None:
    outcome = call("formats")
    assert outcome.code == 0
    told = [re.split(" {2,}", line.strip()) for line in outcome.output.splitlines()]
    assert ["compressed-tensors", "2–8", "any divisor", "symmetric, integer", "transformers, vllm"] in told
    assert ["dashq-packed-linear", "2–4", "any", "real", "–"] in told
    assert ["gguf", "2–5", "16, 32", "real, symmetric", "gguf, llama.cpp, llama.cpp-float32"] in told
    assert ["mlx", "2–4, 8", "32, 64, 128", "real", "mlx, mlx-lm"] in told


def test_push_uploads_a_finished_result_alone(
    results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Api:
        def create_repo(self, repository: str, exist_ok: bool) -> str:
            calls.append(("create", (repository, exist_ok)))
            return f"https://hub.example/{repository}"

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            calls.append(("upload", (repo_id, folder_path)))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    outcome = call("convert", results["metal"], "--to", "mlx", "--output", tmp_path / "new", "--push-to-hub", "me/mine")
    assert outcome.code == 0, outcome.errors
    assert "https://hub.example/me/mine" in outcome.output
    assert calls == [("create", ("me/mine", True)), ("upload", ("me/mine", tmp_path / "new"))]
