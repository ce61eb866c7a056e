"""Formats of other programs: models that they refuse, what the programs' own code makes of them, and broken files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import call
from dashq import CheckpointError, PlanError, run
from dashq.results.checkpoint import build_serializer, open_checkpoint, open_network
from dashq.results.convert import convert
from dashq.results.verify import verify
from pico import pico_model
from recipes import build_recipe

MIXTURE = Path(__file__).parents[1] / "data" / "mixture"
FOREIGN = ("metal", "compressed-tensors", "gptq", "dashq-packed-linear")
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
EXPERTS = [{"match": ".*experts.*", "skip": True}]


def scheme(bits: int, size: int) -> dict[str, Any]:
    return {
        "bits": bits,
        "estimator": "diagonal",
        "grouper": {"name": "contiguous", "size": size},
        "solver": "irls",
        "router": "routed",
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model("llama", tmp_path_factory.mktemp("model"), torch.float16, **SIZES)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained mixture in dashq's own format."""
    output = tmp_path_factory.mktemp("mixture") / "native"
    return run(build_recipe(MIXTURE, output, scheme=scheme(5, 32), certificate_groups=0))


@pytest.mark.parametrize("name", FOREIGN)
def test_experts_are_refused_by_layer_with_the_formats_that_could(name: str, tmp_path: Path) -> None:
    recipe = build_recipe(MIXTURE, tmp_path / "out", scheme=scheme(4, 32), serializer=name)
    told = (
        rf"model\.layers\.0\.mlp\.experts\.gate_up_proj\.0 and 63 more: format {name} cannot hold experts of a "
        "mixture, which its programs keep otherwise. Formats that can hold such a layer: dashq, mlx$"
    )
    with pytest.raises(PlanError, match=told):
        run(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FOREIGN)
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


def test_programs_that_would_not_find_experts_get_no_mixture_at_all(tmp_path: Path) -> None:
    recipe = build_recipe(MIXTURE, tmp_path / "out", scheme=scheme(4, 32), serializer="gptq", overrides=EXPERTS)
    with pytest.raises(PlanError, match=r"model.layers.0.mlp.experts.gate_up_proj: the programs of format"):
        run(recipe)


def test_transformers_opens_a_mixture_whose_experts_are_left_alone(tmp_path: Path) -> None:
    serializer = {"name": "metal", "dtype": "bfloat16"}
    recipe = build_recipe(MIXTURE, tmp_path / "out", scheme=scheme(4, 32), serializer=serializer, overrides=EXPERTS)
    assert all(check.passed for check in verify(run(recipe), "transformers"))


@pytest.mark.parametrize("name", ["metal", "compressed-tensors"])
@pytest.mark.parametrize(("model", "other"), [("float16", "bfloat16"), ("bfloat16", "float16"), ("float32", "float16")])
def test_scales_that_transformers_would_round_are_refused_with_the_way_out(
    name: str, model: str, other: str, tmp_path: Path
) -> None:
    folder = pico_model("llama", tmp_path / "model", getattr(torch, model), **SIZES)
    serializer = {"name": name, "dtype": other}
    with pytest.raises(PlanError, match=rf"take `serializer: {{name: {name}, dtype: {model}}}`"):
        run(build_recipe(folder, tmp_path / "out", scheme=scheme(4, 32), serializer=serializer))


@pytest.mark.parametrize("name", ["metal", "compressed-tensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_transformers_reads_the_same_weights_in_models_of_every_type(name: str, dtype: str, tmp_path: Path) -> None:
    if name == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    folder = pico_model("llama", tmp_path / "model", getattr(torch, dtype), **SIZES)
    serializer = {"name": name, "dtype": dtype}
    recipe = build_recipe(folder, tmp_path / "out", scheme=scheme(4, 32), serializer=serializer, certificate_groups=0)
    assert all(check.passed for check in verify(run(recipe), "transformers"))


@pytest.mark.parametrize("name", ["mlx", "metal", "compressed-tensors", "gptq"])
def test_transposed_layers_are_refused(name: str, tmp_path: Path) -> None:
    model = pico_model("gpt2", tmp_path / "model", torch.float16, n_embd=64, hidden_size=64, n_inner=96)
    recipe = build_recipe(model, tmp_path / "out", scheme=scheme(4, 32), serializer=name)
    with pytest.raises(
        PlanError, match=r"transformer.h.0.attn.c_attn: format .* not a Conv1D.* Format that can: dashq"
    ):
        run(recipe)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mlx_lm_computes_with_the_files(bits: int, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    own = [{"match": ".*v_proj", "bits": 8, "grouper": {"name": "contiguous", "size": 64}}]
    own += [{"match": ".*1.mlp.up_proj", "skip": True}]
    folder = run(build_recipe(model, tmp_path / "out", scheme=scheme(bits, 32), serializer="mlx", overrides=own))
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
    model = pico_model(family, tmp_path / "model", torch.float16, **(SIZES | changes))
    folder = run(build_recipe(model, tmp_path / "out", scheme=scheme(4, 32), serializer="mlx", certificate_groups=0))
    assert all(check.passed for check in verify(folder, "mlx-lm"))
    back = convert(folder, build_serializer({"name": "dashq"}), tmp_path / "back")
    configs = [json.loads((one / "config.json").read_text()) for one in (model, back)]
    assert configs[0]["rope_parameters"] == configs[1]["rope_parameters"]


@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_the_compressor_of_compressed_tensors_packs_the_same_tensors(
    bits: int, zero: str, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy

    serializer = {"name": "compressed-tensors", "zero": zero}
    only = [{"match": r".*(?<!layers\.0\.mlp\.down_proj)", "skip": True}]
    folder = run(build_recipe(model, tmp_path / "out", scheme=scheme(bits, 32), serializer=serializer, overrides=only))
    checkpoint = open_checkpoint(folder)
    arguments = QuantizationArgs(
        num_bits=bits, symmetric=zero == "symmetric", strategy=QuantizationStrategy.GROUP, group_size=32
    )
    for name in checkpoint.layers:
        q, ours = checkpoint.quantized(name), checkpoint.packed(name)
        state = {"weight": q.dequantize(), "weight_scale": q.scale.float()}
        state["weight_zero_point"] = (q.zeros - q.grid.middle).to(torch.int8)
        theirs = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=arguments))
        assert theirs.keys() == ours.keys()
        for key in theirs.keys() - {"weight_scale"}:
            assert theirs[key].equal(ours[key]), key


# What each format's file is broken with, and what is said of it.
FILES = {
    "dashq": "model.safetensors",
    "mlx": "model.safetensors",
    "metal": "model.safetensors",
    "compressed-tensors": "model.safetensors",
    "gptq": "model.safetensors",
    "dashq-packed-linear": "model.safetensors",
    "gguf": "model.gguf",
}


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("results")
    return {
        name: run(
            build_recipe(
                model,
                folder / name,
                scheme=scheme(3 if name == "dashq-packed-linear" else 4, 32),
                serializer={"name": "gguf", "four_bits": "Q4_1"} if name == "gguf" else name,
                certificate_groups=0,
            )
        )
        for name in FILES
    }


@pytest.mark.parametrize("keep", [0, 4, 100, -1000])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(keep: int, name: str, results: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(results[name], tmp_path / "x") / FILES[name]
    path.write_bytes(path.read_bytes()[:keep])
    outcome = call("verify", tmp_path / "x")
    assert outcome.code == 2
    assert f"{path} is truncated or not a" in outcome.errors


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_is_named(name: str, results: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(results[name], tmp_path / "x") / FILES[name]
    path.write_text("It was a bright cold day in April, and the clocks were striking thirteen.\n" * 9)
    outcome = call("verify", tmp_path / "x")
    assert outcome.code == 2
    assert f"{path} is truncated or not a" in outcome.errors


def test_a_gguf_file_of_an_unknown_version_is_refused(results: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(results["gguf"], tmp_path / "x") / "model.gguf"
    content = path.read_bytes()
    path.write_bytes(content[:4] + (99).to_bytes(4, "little") + content[8:])
    with pytest.raises(CheckpointError, match="version 99"):
        open_checkpoint(tmp_path / "x")


def test_a_gguf_file_of_another_model_is_refused(results: dict[str, Path], tmp_path: Path) -> None:
    sizes: dict[str, Any] = SIZES | {"intermediate_size": 128}
    other = pico_model("llama", tmp_path / "other", torch.float16, **sizes)
    recipe = build_recipe(other, tmp_path / "out", scheme=scheme(5, 32), serializer="gguf", certificate_groups=0)
    folder = shutil.copytree(results["gguf"], tmp_path / "x")
    shutil.copy(run(recipe) / "model.gguf", folder)
    with pytest.raises(CheckpointError, match=r"proj.weight is torch.uint8 .* where format 'gguf' needs torch.uint8"):
        list(verify(folder))


@pytest.mark.parametrize(
    ("name", "tensor", "change", "message"),
    [
        ("dashq", "scale", lambda x: x[:-1].clone(), r"scale is torch.float16 \[95, 2\] where format 'dashq' needs"),
        ("metal", "qbiases", lambda x: None, "lacks the tensor .*qbiases"),
        ("compressed-tensors", "weight_packed", lambda x: x.T.contiguous(), "weight_packed is torch.int32"),
        (
            "compressed-tensors",
            "weight_shape",
            lambda x: x.flip(0).clone(),
            r"its weight_shape is \[64, 96\], and its scales are of \[96, 64\]",
        ),
        ("compressed-tensors", "weight_scale", lambda x: x / 0, "a scale or offset is not a finite number"),
        ("gptq", "scales", lambda x: x.to(torch.bfloat16), "scales is torch.bfloat16"),
        ("gptq", "g_idx", lambda x: x.flip(0).clone(), "its columns are in another order"),
        ("dashq-packed-linear", "W_q_packed", lambda x: x | 1 << 30, "codes out of range"),
        ("dashq-packed-linear", "zero", lambda x: x * float("nan"), "a scale or offset is not a finite number"),
    ],
)
def test_a_wrong_tensor_is_named(
    name: str, tensor: str, change: Any, message: str, results: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(results[name], tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.0.mlp.up_proj.{tensor}"
    tensors[key] = change(tensors[key])
    save_file({key: value for key, value in tensors.items() if value is not None}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        list(verify(folder))


def test_a_zero_above_the_largest_code_is_refused(model: Path, tmp_path: Path) -> None:
    serializer = {"name": "gptq", "version": 1, "zero": "symmetric"}
    folder = run(
        build_recipe(model, tmp_path / "out", scheme=scheme(4, 32), serializer=serializer, certificate_groups=0)
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qzeros"].fill_(-1)  # 15 in each place, and version 1 stores zeros less one
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.up_proj: a zero is above the largest code, 15"):
        list(verify(folder))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"nbits": 5}, r"5 bits, where \(2, 3, 4\) can be read"),
        ({"num_groups": 7}, "7 groups of 32 do not fill rows"),
        ({"quant_in_features": 128}, "do not fill rows"),
        ({"scale_zero_dtype": "bfloat16"}, "where float16 can be read"),
        ({"group_size": None}, "does not describe packed layers"),
    ],
)
def test_a_checkpoint_of_the_authors_that_is_otherwise_is_refused(
    change: dict[str, Any], reason: str, results: dict[str, Path], tmp_path: Path
) -> None:
    own = shutil.ignore_patterns("report.json", "recipe.yaml")
    folder = shutil.copytree(results["dashq-packed-linear"], tmp_path / "x", ignore=own)
    content = json.loads((folder / "dashq_config.json").read_text())
    content["model.layers.0.mlp.up_proj"] |= change
    (folder / "dashq_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder)


@pytest.mark.parametrize(("name", "reason"), [("report.json", "is no finished"), ("recipe.yaml", "is not as dashq")])
def test_a_result_without_its_own_files_is_unfinished(
    name: str, reason: str, results: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(results["mlx"], tmp_path / "x", ignore=shutil.ignore_patterns(name))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(folder)


def test_a_result_of_an_unknown_version_is_refused(results: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(results["dashq"], tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    outcome = call("verify", folder)
    assert outcome.code == 2
    assert "format version 99; this dashq reads version 1" in outcome.errors


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("papyrus", "the format 'papyrus': name: no serializer named 'papyrus'. Installed: compressed-tensors"),
        ("{name: ", "the format '{name: ' is not valid YAML"),
        ("{name: mlx, dtipe: x}", "unknown key 'dtipe'. Did you mean 'dtype'?"),
        ("{name: mlx, dtype: x}", "dtype: Input should be 'float16', 'bfloat16' or 'float32'"),
        ("7", "expected a name or a mapping with a `name`, got 7"),
    ],
)
def test_a_format_that_is_none_is_told(to: str, message: str, results: dict[str, Path], tmp_path: Path) -> None:
    outcome = call("convert", results["dashq"], "--to", to, "--output", tmp_path / "new")
    assert outcome.code == 2
    assert message in outcome.errors
    assert not (tmp_path / "new").exists()


def test_a_result_is_not_converted_into_its_own_folder(results: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(results["dashq"], tmp_path / "x")
    outcome = call("convert", folder, "--to", "mlx", "--output", tmp_path / "y" / ".." / "x", "--overwrite")
    assert outcome.code == 2
    assert "is what is converted" in outcome.errors
    assert all(check.passed for check in verify(folder))


def test_the_folder_that_one_stands_in_is_converted(
    results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(shutil.copytree(results["dashq"], tmp_path / "x"))
    outcome = call("convert", ".", "--to", "mlx")
    assert outcome.code == 0, outcome.errors
    assert all(check.passed for check in verify(tmp_path / "x-mlx"))


def test_an_interrupted_conversion_leaves_nothing_that_looks_complete(results: dict[str, Path], tmp_path: Path) -> None:
    native = results["dashq"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dashq.results.output.Output.report", None)
        with pytest.raises(TypeError):
            convert(native, build_serializer({"name": "mlx"}), tmp_path / "new")
    with pytest.raises(CheckpointError, match="is no finished result"):
        open_checkpoint(tmp_path / "new")
    folder = convert(native, build_serializer({"name": "mlx"}), tmp_path / "new")
    assert all(check.passed for check in verify(folder))


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
    name: str, program: str, package: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    monkeypatch.setattr("dashq.results.output.SHARD_BYTES", 10_000)
    serializer = {"name": "gguf", "four_bits": "Q4_1"} if name == "gguf" else name
    recipe = build_recipe(model, tmp_path / "out", scheme=scheme(4, 32), serializer=serializer, certificate_groups=0)
    folder = run(recipe)
    if name != "gguf":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
    assert all(check.passed for check in verify(folder, program))
