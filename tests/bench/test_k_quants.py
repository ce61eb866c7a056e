"""llama.cpp's quantizer is given a layer and its importances, and its blocks are read back as they lie in files."""

import gguf
import pytest
import torch
from bench._k_quants import LlamaCppSolver, quantized_rows

from dashq import Diagonal, Grouping
from dashq.solving.arithmetic import weighted_error
from dashq_plugins.formats.gguf.blocks import TYPES
from tensors import noise


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q6_K"])
def test_it_solves_as_the_package_reads_its_blocks(name: str) -> None:
    pytest.importorskip("llama_cpp")
    kind, weight, importance = TYPES[name], noise(1, 3, 512), noise(2, 512).exp()
    packed = quantized_rows(weight, importance, kind)
    solved = LlamaCppSolver().solve(weight, Diagonal(importance), Grouping(columns=512, size=kind.size), kind.grid)
    read = torch.from_numpy(gguf.dequantize(packed.numpy(), kind.kind))
    torch.testing.assert_close(solved.dequantize(), read)
    codes, scale, offset = kind.from_bytes(kind.to_bytes(solved))
    assert codes.equal(solved.codes)
    torch.testing.assert_close((scale, offset), (solved.scale, solved.offset))


def test_it_is_nearer_where_columns_matter_more() -> None:
    pytest.importorskip("llama_cpp")
    kind, weight, importance = TYPES["Q2_K"], noise(1, 8, 512), (3 * noise(2, 512)).exp()
    errors = [
        weighted_error(weight, torch.from_numpy(gguf.dequantize(packed.numpy(), kind.kind)), Diagonal(importance))
        for packed in (quantized_rows(weight, given, kind) for given in (importance, torch.ones(512)))
    ]
    assert errors[0] < 0.8 * errors[1]
