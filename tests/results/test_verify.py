"""A result is compared with what the solver found, with the format's own rules and with what programs read."""

import json
import shutil
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from commands import call
from dashq import CheckpointError, Opened, Program, hookimpl, load_registry, run
from dashq.results.checkpoint import open_network
from dashq.results.fingerprint import content_digest
from dashq.results.verify import verify
from format_results import SCHEMES, WEIGHT_FILES, FormatResults
from recipes import build_recipe, small_scheme

LAYER = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("label", SCHEMES)
def test_every_format_holds_what_the_solver_found(label: str, results: FormatResults) -> None:
    checks = list(verify(results[label]))
    layers = json.loads((results[label] / "report.json").read_text())["layers"]
    assert len(layers) == 7
    assert sum(check.kind == "layers" for check in checks) == len(layers)
    assert all(check.passed for check in checks)


def changed(folder: Path, target: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> Path:
    """A copy of a result with one tensor changed, or without it where the change gives None."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    tensor = change(tensors.pop(name))
    save_file(tensors if tensor is None else tensors | {name: tensor}, target / "model.safetensors")
    return target


def test_a_changed_number_is_a_difference(results: FormatResults, tmp_path: Path) -> None:
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
    label: str, file: str, keys: list[str], results: FormatResults, tmp_path: Path
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


@pytest.mark.parametrize("label", ["dashq", "Q4_1"])
def test_every_tensor_is_compared_with_what_the_run_wrote(label: str, results: FormatResults) -> None:
    checks = [check for check in verify(results[label]) if check.kind == "tensors"]
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= {check.name for check in checks}
    assert all(check.passed for check in checks)


@pytest.mark.parametrize(
    ("name", "change", "kind"),
    [
        ("model.norm.weight", lambda x: x * 1.01, "tensors"),
        ("model.embed_tokens.weight", lambda x: x * 3, "tensors"),
        ("model.embed_tokens.weight", lambda x: None, "tensors"),
        ("model.layers.0.input_layernorm.weight", lambda x: torch.zeros_like(x), "tensors"),
    ],
)
def test_a_changed_or_missing_tensor_outside_the_layers_is_a_difference(
    name: str, change: Any, kind: str, results: FormatResults, tmp_path: Path
) -> None:
    folder = changed(results["dashq"], tmp_path / "x", name, change)
    assert [(check.kind, check.name) for check in verify(folder) if not check.passed] == [(kind, name)]
    outcome = call("verify", folder)
    assert outcome.code == 1
    assert outcome.output.count("differs") == 1


@pytest.mark.parametrize("label", ["dashq", "mlx", "Q4_1"])
def test_a_changed_or_missing_file_that_came_from_the_model_is_a_difference(
    label: str, results: FormatResults, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(results[label], tmp_path / "x"))
    carried = {check.name for check in verify(folder) if check.kind == "files"}
    assert carried >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"}
    assert carried == {path.name for path in folder.iterdir()} & {path.name for path in results.model.iterdir()} - {
        "config.json",
        "model.safetensors",
    }
    settings = (folder / "tokenizer_config.json").read_bytes()
    (folder / "tokenizer_config.json").write_bytes(settings + b"\n")
    (folder / "LICENSE").unlink()
    (folder / "README.md").write_text("what users write of it is theirs")
    assert [(check.kind, check.name) for check in verify(folder) if not check.passed] == [
        ("files", "LICENSE"),
        ("files", "tokenizer_config.json"),
    ]
    outcome = call("verify", folder)
    assert outcome.code == 1
    assert "differs tokenizer_config.json from report" in outcome.output


def test_a_result_of_an_earlier_version_has_no_digests_of_files_and_passes(
    results: FormatResults, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(results["dashq"], tmp_path / "x"))
    report = json.loads((folder / "report.json").read_text())
    del report["file_digests"], report["seal"]
    (folder / "report.json").write_text(json.dumps(report))
    checks = list(verify(folder))
    assert {check.kind for check in checks} == {"layers", "tensors", "settings"}
    assert all(check.passed for check in checks)


def test_no_name_in_a_report_leads_out_of_its_folder(results: FormatResults, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(results["dashq"], tmp_path / "x"))
    (tmp_path / "private.txt").write_text("a secret")
    report = json.loads((folder / "report.json").read_text())
    report["file_digests"] = {"../private.txt": content_digest(tmp_path / "private.txt")}
    (folder / "report.json").write_text(json.dumps(report))
    assert [check.name for check in verify(folder) if not check.passed] == ["../private.txt", "report.json"]


@pytest.mark.parametrize("label", ["dashq", "mlx", "Q4_1"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 3), ("hidden_size", 10**12), ("num_hidden_layers", 10**9), ("num_attention_heads", 0)],
)
def test_a_configuration_of_another_model_is_a_difference_and_nothing_is_built_from_it(
    label: str, key: str, value: int, results: FormatResults, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(results[label], tmp_path / "x"))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {key: value}))
    failed = [check for check in verify(folder) if not check.passed]
    assert [(check.kind, check.name) for check in failed] == [("settings", f"config.json {key}")]


def test_shards_in_each_others_place_are_a_difference(
    wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashq.results.shards.SHARD_BYTES", 10_000)
    folder = run(build_recipe(wide_model, tmp_path / "out", scheme=small_scheme(32, solver="rtn")))
    assert all(check.passed for check in verify(folder))
    one, two = (folder / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    contents = one.read_bytes(), two.read_bytes()
    two.write_bytes(contents[0])
    one.write_bytes(contents[1])
    failed = {check.name for check in verify(folder) if not check.passed}
    assert "model.safetensors.index.json model.norm.weight" in failed
    two.write_bytes(contents[1][:-10])
    with pytest.raises(CheckpointError, match="is truncated or not a safetensors file"):
        list(verify(folder))


def test_a_program_that_is_unknown_or_missing_is_told(results: FormatResults) -> None:
    outcome = call("verify", results["metal"], "--with", "abacus")
    assert outcome.code == 2
    assert "knows no program 'abacus'. Programs: transformers" in outcome.errors


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_truncated_file_is_named(keep: int, name: str, results: FormatResults, tmp_path: Path) -> None:
    path = shutil.copytree(results[name], tmp_path / "x") / WEIGHT_FILES[name]
    path.write_bytes(path.read_bytes()[:keep])
    outcome = call("verify", tmp_path / "x")
    assert outcome.code == 2
    assert f"{path} is truncated or not a" in outcome.errors


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_a_foreign_file_is_named(name: str, results: FormatResults, tmp_path: Path) -> None:
    path = shutil.copytree(results[name], tmp_path / "x") / WEIGHT_FILES[name]
    path.write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 9)
    outcome = call("verify", tmp_path / "x")
    assert outcome.code == 2
    assert f"{path} is truncated or not a" in outcome.errors


@pytest.mark.parametrize(
    ("name", "tensor", "change", "message"),
    [
        ("dashq", "scale", lambda x: x[:-1].clone(), r"scale is float16 \[511, 4\] where format 'dashq' needs"),
        (
            "mlx",
            "scales",
            lambda x: x[:5].clone(),
            rf"{LAYER}.scales is float16 \[5, 4\] where format 'mlx' needs",
        ),
        ("mlx", "scales", lambda x: x.float(), f"{LAYER}.scales is float32"),
        ("mlx", "scales", lambda x: None, f"lacks the tensor {LAYER}.scales"),
        ("mlx", "biases", lambda x: x * float("nan"), f"{LAYER}: a scale or offset is not a finite number"),
        ("metal", "qbiases", lambda x: None, "lacks the tensor .*qbiases"),
        ("compressed-tensors", "weight_packed", lambda x: x.T.contiguous(), "weight_packed is int32"),
        (
            "compressed-tensors",
            "weight_shape",
            lambda x: x.flip(0).clone(),
            r"its weight_shape is \[256, 512\], and its scales are of \[512, 256\]",
        ),
        ("compressed-tensors", "weight_scale", lambda x: x / 0, "a scale or offset is not a finite number"),
        ("gptq", "scales", lambda x: x.to(torch.bfloat16), "scales is bfloat16"),
        ("gptq", "g_idx", lambda x: x.flip(0).clone(), r"its columns are in another order \(g_idx\)"),
        ("dashq-packed-linear", "W_q_packed", lambda x: x | 1 << 30, "codes out of range"),
        ("dashq-packed-linear", "zero", lambda x: x * float("nan"), "a scale or offset is not a finite number"),
    ],
)
def test_a_wrong_tensor_is_named(
    name: str, tensor: str, change: Any, message: str, results: FormatResults, tmp_path: Path
) -> None:
    folder = changed(results[name], tmp_path / "x", f"{LAYER}.{tensor}", change)
    with pytest.raises(CheckpointError, match=message):
        list(verify(folder))


@pytest.mark.parametrize(
    ("name", "program", "package"),
    [
        ("mlx", "mlx-lm", "mlx_lm"),
        ("metal", "transformers", "transformers"),
        ("compressed-tensors", "transformers", "compressed_tensors"),
        ("gguf", "gguf", "gguf"),
    ],
)
def test_programs_open_results_of_several_shards(
    name: str, program: str, package: str, wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    monkeypatch.setattr("dashq.results.shards.SHARD_BYTES", 10_000)
    serializer = {"name": "gguf", "four_bits": "Q4_1"} if name == "gguf" else name
    recipe = build_recipe(wide_model, tmp_path / "out", scheme=small_scheme(32, bits=4), serializer=serializer)
    folder = run(recipe)
    if name != "gguf":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
    assert all(check.passed for check in verify(folder, program))


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (2.0, False)])
def test_logits_may_differ_by_what_computing_in_the_programs_type_changes(
    factor: float, passed: bool, results: FormatResults
) -> None:
    def program(folder: Path, trust_remote_code: bool) -> Opened:
        network = open_network(folder, torch.bfloat16)
        return Opened(
            logits=lambda ids: network(torch.tensor([ids])).logits[0].float() * factor,
            logits_tolerance=0.0,
            computes_in=torch.bfloat16,
        )

    abacus = Program(name="abacus", format="gptq", open=program)
    registry = load_registry(SimpleNamespace(dashq_programs=hookimpl(lambda: [abacus])))
    check = list(verify(results["gptq-v1"], "abacus", registry))[-1]
    assert check.difference > 0
    assert check.passed == passed


@pytest.mark.parametrize("label", ["dashq", "Q4_1"])
def test_a_changed_report_is_a_difference(label: str, results: FormatResults, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(results[label], tmp_path / "x"))
    report = json.loads((folder / "report.json").read_text())
    report["layers"].pop()
    (folder / "report.json").write_text(json.dumps(report))
    assert ("settings", "report.json") in {(check.kind, check.name) for check in verify(folder) if not check.passed}


def test_a_report_of_an_earlier_version_has_no_seal(results: FormatResults, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(results["dashq"], tmp_path / "x"))
    report = json.loads((folder / "report.json").read_text())
    report.pop("seal")
    (folder / "report.json").write_text(json.dumps(report))
    assert all(check.passed for check in verify(folder))
