"""The report beside a result tells what the run did to each layer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dashq import CheckpointError, load_recipe, run
from dashq.results.checkpoint import open_checkpoint
from dashq.results.events import Event, LayerDone, RunStarted
from dashq.results.report import read_report
from recipes import REGISTRY, build_recipe


def test_the_report_and_the_recipe_beside_the_result_are_true(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    recipe = build_recipe(
        model, tmp_path / "out", dtype="bfloat16", certificate_groups=9, overrides=[{"match": ".*down_proj", "bits": 4}]
    )
    out = run(recipe, events.append)
    report = json.loads((out / "report.json").read_text())
    layers, totals = report["layers"], report["totals"]
    tensors = load_file(out / "model.safetensors")
    packed = [tensor for name, tensor in tensors.items() if name.endswith((".codes", ".scale", ".offset"))]
    weights = sum(layer["rows"] * layer["columns"] for layer in layers)
    assert totals["weights"] == weights
    assert totals["layers"] == len(layers) == len([event for event in events if isinstance(event, LayerDone)])
    assert totals["bits_per_weight"] == 8 * sum(tensor.nbytes for tensor in packed) / weights
    assert {layer["bits"] for layer in layers if "down_proj" in layer["name"]} == {4}
    assert all(0 < layer["error"] <= layer["minmax_error"] for layer in layers)
    assert next(event for event in events if isinstance(event, RunStarted)) == RunStarted(
        blocks=3, layers=len(layers), tokens=3 * 40, computed="on cpu in bfloat16"
    )
    assert {layer["tokens"] for layer in layers} == {3 * 40}
    assert {"load", "calibrate", "solve", "certify", "write", "judge"} == report["seconds"].keys()
    assert report["computed"] == "on cpu in bfloat16"
    assert report["versions"]["torch"] == torch.__version__
    assert load_recipe(out / "recipe.yaml", REGISTRY) == recipe
    assert report.pop("seal")
    assert json.loads(json.dumps(read_report(out).to_json())) == report


def test_groups_that_saw_no_input_are_told_in_the_report(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][:16] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    out = run(build_recipe(tmp_path / "model", tmp_path / "out"))
    layers = json.loads((out / "report.json").read_text())["layers"]
    assert {layer["name"]: layer["fallbacks"] for layer in layers if layer["fallbacks"]} == {
        f"model.layers.1.self_attn.{name}_proj": ["1 of 3 groups of columns saw no input: treated as flat"]
        for name in "qkv"
    }


def test_a_report_that_is_missing_broken_or_older_is_told_with_the_place(model: Path, tmp_path: Path) -> None:
    out = run(build_recipe(model, tmp_path / "out"))
    path = out / "report.json"
    report = json.loads(path.read_text())
    layer = {key: value for key, value in report["layers"][0].items() if key != "digest"}
    cases = [
        ("{", "Expecting property name"),
        ("[]", "it holds list, not a mapping"),
        (json.dumps({key: value for key, value in report.items() if key != "chosen"}), "chosen: Field required"),
        (json.dumps(report | {"layers": [layer]}), r"layers\.0\.digest: Field required"),
        (json.dumps(report | {"seconds": {"solve": "long"}}), r"seconds\.solve: Input should be a valid number"),
    ]
    for text, reason in cases:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=rf"report\.json is not as this dashq writes it: .*{reason}"):
            open_checkpoint(out)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"report\.json is not as this dashq writes it: .*No such file"):
        read_report(out)
