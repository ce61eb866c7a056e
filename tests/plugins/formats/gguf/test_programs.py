"""Programs compute with GGUF files what the model computes with the solver's weights."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq import run
from dashq.results.verify import verify
from dashq_plugins.formats.gguf.programs import in_float32, rewrite, round_to_8_bits
from dashq_plugins.formats.gguf.serializer import NAMES
from format_results import FormatResults
from gguf_results import PHI, SIZES, recipe
from pico import pico_model
from tensors import noise
from towers import SEEING


@pytest.mark.parametrize("program", ["llama.cpp", "llama.cpp-float32"])
def test_llama_cpp_computes_the_same(program: str, result: tuple[Path, Path]) -> None:
    pytest.importorskip("llama_cpp")
    *_, logits = verify(result[1], program)
    assert logits.passed, logits


@pytest.mark.parametrize("label", [label for labels in NAMES.values() for label in labels])
def test_llama_cpp_multiplies_with_every_type(label: str, results: FormatResults) -> None:
    pytest.importorskip("llama_cpp")
    *_, logits = verify(results[label], "llama.cpp")
    assert logits.passed, logits


@pytest.mark.parametrize("original", [256, 512])
def test_llama_cpp_slows_rotary_frequencies_down_by_the_factors_of_the_text_and_context(
    original: int, tmp_path: Path
) -> None:
    """In a context of 512 tokens these are the factors for short texts, unless the original context is shorter."""
    pytest.importorskip("llama_cpp")
    sizes = {"max_position_embeddings": 1024, "original_max_position_embeddings": original, "rope_parameters": PHI}
    folder = run(recipe(pico_model("phi3", tmp_path / "model", torch.float16, **(SIZES | sizes)), tmp_path / "out"))
    *_, logits = verify(folder, "llama.cpp-float32")
    assert logits.passed == (original == 512), logits


@pytest.mark.parametrize("make", SEEING)
def test_llama_cpp_computes_the_text_model_of_one_that_takes_images(make: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    folder = run(recipe(make(tmp_path / "model", **SIZES), tmp_path / "out"))
    *_, logits = verify(folder, "llama.cpp-float32")
    assert logits.passed, logits


@given(st.integers(0, 999), st.sampled_from([32, 256]))
def test_inputs_are_rounded_to_a_254th_of_the_largest_of_their_block(seed: int, block: int) -> None:
    x = noise(seed, 3, 2 * block) ** 3
    blocks, off = (values.unflatten(-1, (-1, block)) for values in (x, round_to_8_bits(x, block) - x))
    largest = blocks.abs().amax(-1)
    assert bool((off.abs().amax(-1) <= largest / 254 * 1.0001).all())
    assert len((round_to_8_bits(x, block)[0, :block] / largest[0, 0] * 127).round().unique()) <= 255


def test_a_copy_in_float32_says_the_same(result: tuple[Path, Path], tmp_path: Path) -> None:
    path = result[1] / "model.gguf"
    rewrite(path, tmp_path / "copy.gguf", in_float32)
    ours, copy = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "copy.gguf")
    assert ours.fields.keys() - {"general.file_type", "general.quantization_version"} == copy.fields.keys()
    own = {"general.file_type", "general.quantization_version", "GGUF.kv_count"}
    assert all(copy.fields[name].contents() == ours.fields[name].contents() for name in ours.fields.keys() - own)
    for tensor, copied in zip(ours.tensors, copy.tensors, strict=True):
        assert (tensor.name, copied.tensor_type.name) == (copied.name, "F32")
        assert (gguf.dequantize(tensor.data, tensor.tensor_type) == copied.data).all()
