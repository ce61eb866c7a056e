"""Embeddings and heads in other programs' formats: their programs see the numbers of the solver."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dashq import load_registry, run
from dashq.results.verify import verify
from pico import WIDE, pico_model
from recipes import build_recipe, small_scheme

FORMATS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "mlx": ("mlx", "llama", ("mlx", "mlx-lm")),
    "mlx-untied": ("mlx", "llama-untied-biased", ("mlx", "mlx-lm")),
    "gguf": ({"name": "gguf", "four_bits": "Q4_1"}, "llama", ("gguf", "llama.cpp-float32", "llama.cpp")),
    "gguf-untied": ({"name": "gguf", "four_bits": "Q4_1"}, "mistral", ("gguf", "llama.cpp-float32", "llama.cpp")),
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
