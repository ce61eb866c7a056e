"""Results in compressed-tensors are opened by transformers and packed as its own compressor packs them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from dashq import run
from dashq.results.checkpoint import open_checkpoint
from dashq.results.verify import verify
from format_results import FormatResults
from recipes import build_recipe, small_scheme


@pytest.mark.parametrize("label", ["compressed-tensors", "compressed-tensors-integer"])
def test_transformers_opens_compressed_tensors(label: str, results: FormatResults) -> None:
    pytest.importorskip("compressed_tensors")
    assert all(check.passed for check in verify(results[label], "transformers"))


@torch.no_grad()
def test_the_model_without_its_head_has_the_same_weights(results: FormatResults) -> None:
    pytest.importorskip("compressed_tensors")
    folder, ids = results["compressed-tensors"], torch.arange(12)[None]
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    headless: Any = AutoModel.from_pretrained(folder, dtype=torch.float32)
    expected = whole(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(headless(ids).last_hidden_state, expected)


@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_the_compressor_of_compressed_tensors_packs_the_same_tensors(
    bits: int, zero: str, wide_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy

    serializer = {"name": "compressed-tensors", "zero": zero}
    only = [{"match": r".*(?<!layers\.0\.mlp\.down_proj)", "skip": True}]
    folder = run(
        build_recipe(
            wide_model, tmp_path / "out", scheme=small_scheme(32, bits=bits), serializer=serializer, overrides=only
        )
    )
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
