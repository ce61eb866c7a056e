"""Embeddings and heads in other programs' formats: their programs see the numbers of the solver."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dashq import load_registry, run
from dashq.measuring.choosing import choices_for
from dashq.quantizing.opening import open_model
from dashq.results.report import read_report
from dashq.results.verify import verify
from dashq.runtime.embedding import DashqEmbedding
from gguf_results import SHARED, SIZES
from pico import WIDE, pico_model
from recipes import build_recipe, small_scheme

pytestmark = pytest.mark.usefixtures("sentences")

FORMATS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "mlx": ("mlx", "llama", ("mlx", "mlx-lm")),
    "mlx-untied": ("mlx", "llama-untied-biased", ("mlx", "mlx-lm")),
    "gguf": ({"name": "gguf", "four_bits": "Q4_1"}, "llama", ("gguf", "llama.cpp-float32", "llama.cpp")),
    "gguf-untied": (
        {"name": "gguf", "four_bits": "Q4_1"},
        "llama-untied-biased",
        ("gguf", "llama.cpp-float32", "llama.cpp"),
    ),
    "compressed-tensors": ({"name": "compressed-tensors", "dtype": "float32"}, "mistral", ("transformers", "vllm")),
    "gptq": ({"name": "gptq", "zero": "symmetric"}, "mistral", ("gptqmodel", "vllm")),
}
PACKAGES = {
    "mlx": "mlx",
    "mlx-lm": "mlx_lm",
    "gptqmodel": "gptqmodel",
    "vllm": "vllm",
    "transformers": "compressed_tensors",
}


@pytest.mark.parametrize("label", FORMATS)
def test_programs_read_them(label: str, tmp_path: Path) -> None:
    serializer, family, programs = FORMATS[label]
    entries: dict[str, Any] = {} if family == "llama" else {"head": {"bits": 4}}
    if label.startswith(("mlx", "gguf")):
        entries["embeddings"] = {"bits": 4}
    path = pico_model(family, tmp_path / "model", torch.float32, **WIDE)
    scheme = small_scheme(32, bits=4, solver="rtn")
    out = run(build_recipe(path, tmp_path / "out", scheme=scheme, serializer=serializer, **entries))
    assert all(check.passed for check in verify(out))
    for program in programs:
        package = PACKAGES.get(program, "llama_cpp" if program.startswith("llama") else "gguf")
        try:
            __import__(package)
        except ImportError:
            continue
        failed = [check for check in verify(out, program) if not check.passed]
        assert not failed, (program, failed)


@pytest.mark.parametrize(
    ("serializer", "programs"),
    [
        ("dashq", ()),
        ({"name": "gguf", "four_bits": "Q4_1"}, ("gguf", "llama.cpp-float32")),
    ],
)
def test_embeddings_of_each_block_are_packed_with_the_others(
    serializer: Any, programs: tuple[str, ...], tmp_path: Path
) -> None:
    sizes: dict[str, Any] = SIZES | SHARED
    path = pico_model("gemma4", tmp_path / "model", torch.float16, **sizes)
    scheme = small_scheme(32, bits=4, solver="rtn")
    recipe = build_recipe(path, tmp_path / "out", scheme=scheme, serializer=serializer, embeddings={"bits": 4})
    out = run(recipe)
    roles = {layer.name: layer.role for layer in read_report(out).layers if layer.role != "linear"}
    assert roles == {"model.embed_tokens": "tied", "model.embed_tokens_per_layer": "per_layer"}
    assert all(check.passed for check in verify(out))
    for program in programs:
        package = PACKAGES.get(program, "llama_cpp" if program.startswith("llama") else "gguf")
        if importlib.util.find_spec(package):
            failed = [check for check in verify(out, program) if not check.passed]
            assert not failed, (program, failed)


def test_rows_of_embeddings_of_each_block_are_looked_up_packed(tmp_path: Path) -> None:
    sizes: dict[str, Any] = SIZES | SHARED
    path = pico_model("gemma4", tmp_path / "model", torch.float32, **sizes)
    scheme = small_scheme(32, bits=4, solver="rtn")
    out = run(build_recipe(path, tmp_path / "out", scheme=scheme, embeddings={"bits": 3}, dtype="float32"))
    network: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert isinstance(network.get_per_layer_input_embeddings(), DashqEmbedding)
    ids = torch.arange(9)[None] + 3
    with torch.inference_mode():
        packed = network(ids).logits
        torch.testing.assert_close(network.dequantize()(ids).logits, packed)


def test_no_budget_decides_about_embeddings_of_each_block(tmp_path: Path) -> None:
    sizes: dict[str, Any] = SIZES | SHARED
    path = pico_model("gemma4", tmp_path / "model", **sizes)
    budget = {"bits_per_weight": 4.0, "bits": [2, 3, 4]}
    scheme = small_scheme(32, bits=4, solver="rtn")
    recipe = build_recipe(path, tmp_path / "out", scheme=scheme, embeddings={}, budget=budget)
    choices = choices_for(recipe, open_model(recipe))
    assert len(choices["model.embed_tokens"]) == 3
    assert "model.embed_tokens_per_layer" not in choices
    report = read_report(run(recipe))
    assert {layer.name: layer.bits for layer in report.layers}["model.embed_tokens_per_layer"] == 4


def test_formats_say_what_they_hold() -> None:
    serializers = load_registry().serializers.values()
    assert {cls.name for cls in serializers if cls.holds_embeddings} == {"dashq", "mlx", "gguf"}
    assert {cls.name for cls in serializers if cls.holds_head} == {
        "dashq",
        "mlx",
        "gguf",
        "compressed-tensors",
        "gptq",
    }
