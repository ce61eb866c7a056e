"""A result is converted where nothing is lost, and refused where layers would have to be solved again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from commands import call
from dashq import CheckpointError, PlanError, run
from dashq.results.checkpoint import open_checkpoint, open_network
from dashq.results.convert import convert
from dashq.results.report import read_report
from dashq.results.verify import verify
from dashq.runtime.quantizer import build_serializer
from format_results import WITHOUT_EXPERTS, FormatResults
from pico import TRAINED_MIXTURE
from recipes import build_recipe, small_scheme


@pytest.mark.parametrize(("size", "bits", "to"), [(64, 3, "mlx"), (64, 2, "metal"), (32, 5, "gguf")])
def test_what_loses_nothing_is_converted(size: int, bits: int, to: str, wide_model: Path, tmp_path: Path) -> None:
    native = run(build_recipe(wide_model, tmp_path / "native", scheme=small_scheme(size, bits=bits)))
    outcome = call("convert", native, "--to", to, "--output", tmp_path / "new")
    assert outcome.code == 0, outcome.errors
    assert f"packed as {to}; nothing was solved again" in outcome.output
    assert call("verify", tmp_path / "new").code == 0
    there, here = open_checkpoint(tmp_path / "new"), open_checkpoint(native)
    for name in here.layers:
        assert there.quantized(name).dequantize().equal(here.quantized(name).dequantize())
    assert there.unpacked_tensors()
    back = convert(tmp_path / "new", build_serializer({"name": "dashq"}), tmp_path / "back")
    assert load_file(back / "model.safetensors").keys() == load_file(native / "model.safetensors").keys()


@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_embeddings_that_are_the_head_are_converted_there_and_back(to: str, wide_model: Path, tmp_path: Path) -> None:
    bits = 8 if to == "mlx" else 5  # with real zeros GGUF has 4 and 5
    scheme = small_scheme(32, bits=bits, solver="rtn")
    native = run(build_recipe(wide_model, tmp_path / "native", scheme=scheme, embeddings={"bits": bits}))
    new = convert(native, build_serializer({"name": to}), tmp_path / "new")
    assert all(check.passed for check in verify(new))
    back = convert(new, build_serializer({"name": "dashq"}), tmp_path / "back")
    there, here = load_file(back / "model.safetensors"), load_file(native / "model.safetensors")
    assert there.keys() == here.keys()
    assert "model.embed_tokens.codes" in there
    assert all(tensor.equal(here[name]) for name, tensor in there.items() if "embed_tokens" in name)
    report, original = read_report(new).totals, read_report(native).totals
    assert report.parameters == original.parameters
    ids = torch.arange(12)[None]
    with torch.no_grad():
        logits = [open_network(folder, torch.float32)(ids).logits for folder in (native, new)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_embeddings_are_not_converted_where_they_would_not_be_read(wide_model: Path, tmp_path: Path) -> None:
    scheme = small_scheme(32, bits=4, solver="rtn")
    native = run(build_recipe(wide_model, tmp_path / "native", scheme=scheme, embeddings={"bits": 4}))
    with pytest.raises(PlanError, match=r"^model\.embed_tokens: format metal cannot hold one .* Formats that can"):
        convert(native, build_serializer({"name": "metal"}), tmp_path / "new")


@pytest.mark.parametrize(
    ("label", "to", "reason"),
    [
        ("metal", "gptq", "its zeros are integer, and these are real"),
        ("IQ2_S", "dashq", "its codes stand for other values"),
        ("metal", "gguf", "its scales and offsets are multiples of a super-block's unit, and these are not"),
        ("metal", "dashq-packed-linear", "it stores zeros as float16, and these zeros are others"),
    ],
)
def test_what_would_lose_is_refused_with_what_has_to_be_solved_again(
    label: str, to: str, reason: str, results: FormatResults, tmp_path: Path
) -> None:
    outcome = call("convert", results[label], "--to", to, "--output", tmp_path / "new")
    assert outcome.code == 2
    assert "these layers would have to be solved again" in outcome.errors
    assert reason in outcome.errors
    assert f"recipe.yaml --set serializer={to} --set output=NEW` solves them again" in outcome.errors
    able = "none" if label == "IQ2_S" else "dashq, mlx"
    assert f"formats that hold all layers unchanged: {able}\n" in outcome.errors
    assert outcome.errors.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_the_report_keeps_what_was_chosen_for_the_original_result(wide_model: Path, tmp_path: Path) -> None:
    scheme, budget = small_scheme(64, bits=3), {"bits_per_weight": 4, "bits": [3, 4]}
    native = run(build_recipe(wide_model, tmp_path / "native", scheme=scheme, budget=budget))
    converted = convert(native, build_serializer({"name": "mlx"}), tmp_path / "new")
    assert read_report(native).chosen
    assert read_report(converted).chosen == read_report(native).chosen


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained mixture in dashq's own format."""
    output = tmp_path_factory.mktemp("mixture") / "native"
    return run(build_recipe(TRAINED_MIXTURE, output, scheme=small_scheme(32, bits=5, router="routed")))


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_a_mixture_is_not_converted_where_its_experts_would_not_be_read(
    name: str, mixture: Path, tmp_path: Path
) -> None:
    outcome = call("convert", mixture, "--to", name, "--output", tmp_path / "out")
    assert outcome.code == 2
    assert "model.layers.0.mlp.experts.gate_up_proj.0: format" in outcome.errors
    assert "Formats that can hold such a layer: dashq, gguf" in outcome.errors
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_converted_to_gguf_and_back_and_verified(mixture: Path, tmp_path: Path) -> None:
    assert call("verify", mixture).code == 0
    there = convert(mixture, build_serializer({"name": "gguf"}), tmp_path / "gguf")
    assert call("verify", there, "--with", "gguf").code == 0
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        ours, theirs = (open_network(folder, torch.float32)(ids).logits for folder in (mixture, there))
    assert torch.allclose(ours, theirs, atol=1e-4)
    back = convert(there, build_serializer({"name": "dashq"}), tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (mixture, back))
    assert before.keys() == after.keys()
    assert all(after[name].equal(before[name].to(after[name].dtype)) for name in before)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("papyrus", "no format named 'papyrus'. Installed: compressed-tensors"),
        ("{name: ", "the format '{name: ' is not valid YAML"),
        ("{name: mlx, dtipe: x}", "unknown key 'dtipe'. Did you mean 'dtype'?"),
        ("{name: mlx, dtype: x}", "dtype: should be 'float16', 'bfloat16' or 'float32', not 'x'"),
        ("7", "should be a name or a mapping with a `name`, not 7"),
    ],
)
def test_a_format_that_is_none_is_told(to: str, message: str, results: FormatResults, tmp_path: Path) -> None:
    outcome = call("convert", results["dashq"], "--to", to, "--output", tmp_path / "new")
    assert outcome.code == 2
    assert message in outcome.errors
    assert not (tmp_path / "new").exists()


def test_a_result_is_not_converted_into_its_own_folder(results: FormatResults, tmp_path: Path) -> None:
    folder = shutil.copytree(results["dashq"], tmp_path / "x")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "y").mkdir()
    for output in (tmp_path / "y" / ".." / "x", tmp_path / "link", folder / "below"):
        outcome = call("convert", folder, "--to", "mlx", "--output", output, "--overwrite")
        assert outcome.code == 2
        assert f"the output {output} would touch the model {folder}" in outcome.errors
    assert {path.name for path in folder.iterdir()} == {path.name for path in results["dashq"].iterdir()}
    assert all(check.passed for check in verify(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dashq", "is not as its run wrote it, and `dashq verify` says where: config.json num_hidden_layers"),
        ("Q4_1", "says 1000000000000 decoder blocks, where the files hold"),
    ],
)
def test_a_result_whose_configuration_says_more_blocks_than_it_has_tensors_is_refused(
    name: str, message: str, results: FormatResults, tmp_path: Path
) -> None:
    folder = shutil.copytree(results[name], tmp_path / "absurd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**12}))
    outcome = call("convert", folder, "--to", "dashq", "--output", tmp_path / "out")
    assert outcome.code == 2
    assert message in outcome.errors
    assert not (tmp_path / "out").exists()


def test_a_tilde_in_the_output_of_a_conversion_is_the_home_folder(
    results: FormatResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(results["dashq"], build_serializer({"name": "mlx"}), Path("~/new")) == tmp_path / "new"
    assert all(check.passed for check in verify(tmp_path / "new"))


def test_the_folder_that_one_stands_in_is_converted(
    results: FormatResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(results["dashq"], tmp_path / "x"))
    outcome = call("convert", ".", "--to", "mlx")
    assert outcome.code == 0, outcome.errors
    assert all(check.passed for check in verify(tmp_path / "x-mlx"))


def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(results: FormatResults, tmp_path: Path) -> None:
    native = results["dashq"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dashq.results.output.Output.report", None)
        with pytest.raises(TypeError):
            convert(native, build_serializer({"name": "mlx"}), tmp_path / "new")
    with pytest.raises(CheckpointError, match="is no finished result"):
        open_checkpoint(tmp_path / "new")
    folder = convert(native, build_serializer({"name": "mlx"}), tmp_path / "new")
    assert all(check.passed for check in verify(folder))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.codes"])
def test_a_result_that_has_changed_is_not_converted(name: str, results: FormatResults, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(results["dashq"], tmp_path / "x"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, folder / "model.safetensors")
    outcome = call("convert", folder, "--to", "dashq", "--output", tmp_path / "new")
    assert outcome.code == 2
    assert f"{folder} is not as its run wrote it, and `dashq verify` says where: " in outcome.errors
    assert name.removesuffix(".codes") in outcome.errors
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scheme: {bits: 3}\n", "recipe.yaml is not as dashq writes it: scheme.estimator: this entry is missing"),
        ("device: 7\n", "recipe.yaml is not as dashq writes it: device: should be text, not 7"),
    ],
)
def test_a_recipe_that_has_changed_is_named(setting: str, message: str, results: FormatResults, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(results["dashq"], tmp_path / "x"))
    content = yaml.safe_load((folder / "recipe.yaml").read_text()) | yaml.safe_load(setting)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    outcome = call("convert", folder, "--to", "dashq", "--output", tmp_path / "new")
    assert outcome.code == 2
    assert message in outcome.errors
