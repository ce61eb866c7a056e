"""Files that programs make by themselves are read back as the model, and their bytes are those of the weights."""

from argparse import Namespace
from pathlib import Path

import gguf
import pytest
import torch
from bench.files import bytes_of_weights, plain_gguf, quantize_with_llama_cpp, round_with_mlx, wanted

from dashq.measuring.evaluate import load_model
from pico import WIDE, pico_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_model("llama", tmp_path_factory.mktemp("files") / "model", torch.bfloat16, **WIDE)


def error(path: Path, original: Path) -> float:
    """The largest difference of a layer's weights, as a share of the largest weight."""
    weights = [
        load_model(str(place), dtype="float32").network.get_parameter("model.layers.0.mlp.up_proj.weight").data
        for place in (path, original)
    ]
    return float((weights[0] - weights[1]).abs().max() / weights[1].abs().max())


def test_the_plain_file_is_the_model(folder: Path, tmp_path: Path) -> None:
    path = plain_gguf(folder, tmp_path)
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} == {"F32"}
    ids = torch.arange(20)[None]
    with torch.no_grad():
        there, here = (load_model(str(place), dtype="float32").network(ids).logits for place in (path, folder))
    torch.testing.assert_close(there, here)


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8.5), ("Q4_0", 4.5)])
def test_llama_cpp_makes_a_file_of_the_type(kind: str, bits: float, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = quantize_with_llama_cpp(folder, kind, tmp_path)
    tensors = [tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name.startswith("blk.0.ffn_up")]
    assert [(tensor.tensor_type.name, 8 * tensor.n_bytes / tensor.n_elements) for tensor in tensors] == [(kind, bits)]
    assert bytes_of_weights(path) == path.stat().st_size
    assert 0 < error(path, folder) < (1 / 200 if kind == "Q8_0" else 1 / 10)


def test_mlx_rounds_and_gives_the_same_weights_back(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    made, plain = round_with_mlx(folder, 8, tmp_path)
    assert bytes_of_weights(made) < 0.6 * bytes_of_weights(plain)
    assert 0 < error(plain, folder) < 1 / 100


def test_each_file_that_is_asked_for_is_one_line() -> None:
    arguments = Namespace(llama=[], mlx=[], dashq=["mlx=3", "llama.cpp=4"], level="usual", windows=4, context=1024)
    assert [asked["type"] for asked in wanted(arguments)] == ["--bits 3 --for mlx", "--bits 4 --for llama.cpp"]
