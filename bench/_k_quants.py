"""llama.cpp's own quantizer as a solver: the function that llama-quantize calls for every row, with our importances."""

import ctypes
import importlib
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dashq import Curvature, Grid, Grouping, Quantized, Solver
from dashq_plugins.formats.gguf.blocks import BlockType, type_of


class LlamaCppSolver(Solver):
    """What `llama-quantize --imatrix` makes of a layer, through the library that llama-cpp-python brings."""

    name = "llama_cpp"
    supports_super_blocks: ClassVar[bool] = True
    supports_codebooks: ClassVar[bool] = True

    def solve(
        self, weight: Float[Tensor, "rows columns"], curvature: Curvature, grouping: Grouping, grid: Grid
    ) -> Quantized:
        kind = type_of(grid)
        codes, scale, offset = kind.from_bytes(quantized_rows(weight, curvature.diagonal(), kind))
        return Quantized(codes=codes, scale=scale, offset=offset, grouping=grouping, grid=grid)


def quantized_rows(
    weight: Float[Tensor, "rows columns"], importance: Float[Tensor, " columns"], kind: BlockType
) -> UInt8[Tensor, "rows bytes"]:
    """The bytes of llama.cpp's blocks for a matrix; `importance` are mean squares of inputs, as in an imatrix file."""
    source, weighed = weight.float().contiguous(), importance.float().contiguous()
    rows, columns = source.shape
    target = torch.empty(rows, columns // kind.columns * kind.bytes, dtype=torch.uint8)
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (source, target, weighed)]
    count = _library().ggml_quantize_chunk(int(kind.kind), places[0], places[1], 0, rows, columns, places[2])
    if count != target.numel():
        raise RuntimeError(f"llama.cpp wrote {count} bytes of {kind.name} in place of {target.numel()}")
    return target


@cache
def _library() -> Any:
    """The part of llama.cpp that quantizes rows; its C function is public, and llama-cpp-python does not wrap it."""
    package = Path(str(importlib.import_module("llama_cpp").__file__)).parent
    library = ctypes.CDLL(str(next((package / "lib").glob("libggml-base.*"))))
    numbers = [ctypes.c_int64] * 3  # the first weight, rows, and columns
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *numbers, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
