"""The affine format of MLX: real zeros, for mlx-lm."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from dashq import Grid, Grouping, PlanError, Quantized, Serializer, hookimpl
from dashq.data import Packed
from dashq.programs import Opened, Program
from dashq_plugins._words import (
    flat_codes,
    pack_words,
    refuse_bits,
    refuse_order,
    refuse_short_groups,
    unpack_words,
)

SIZES = (32, 64, 128)  # others are read as garbage at 2 and 3 bits


def open_with_mlx(folder: Path) -> Opened:
    """MLX's own dequantization, in float32 so that its rounding to half precision does not blur the comparison."""
    import json

    import mlx.core as mx  # pyright: ignore[reportMissingImports] - optional

    settings = json.loads((folder / "config.json").read_text())["quantization"]
    tensors = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}

    def weight(name: str) -> Tensor:
        own = settings.get(name, settings)
        codes, scales, biases = (tensors[f"{name}.{key}"] for key in ("weight", "scales", "biases"))
        result = mx.dequantize(
            mx.array(codes.numpy()),
            mx.array(scales.float().numpy()),
            mx.array(biases.float().numpy()),
            group_size=own["group_size"],
            bits=own["bits"],
        )
        return torch.from_numpy(memoryview_of(result))

    return Opened(weight=weight)


def memoryview_of(array: Any) -> Any:
    """An MLX array as a numpy array."""
    import numpy

    return numpy.array(array)


class MlxSerializer(Serializer):
    """2, 3, 4 or 8 bits with a real zero in groups of 32, 64 or 128; each layer its own. Opens in mlx-lm.

    Load it with `mlx_lm.load(FOLDER)`, on a Mac, on Linux with `mlx[cpu]`, or on CUDA.
    """

    name = "mlx"
    programs: ClassVar[Mapping[str, Program]] = {"mlx": open_with_mlx}
    experts = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def grid(self, bits: int) -> Grid:
        refuse_bits(bits, (2, 3, 4, 8), self.name)
        return Grid(bits=bits, dtype=getattr(torch, self.dtype))

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        q = quantized
        refuse_order(q, self.name)
        if q.grouping.size not in SIZES:
            raise PlanError(f"format mlx holds groups of 32, 64 or 128, not {q.grouping.size}")
        refuse_short_groups(q.grouping, self.name)
        words = pack_words(flat_codes(q), q.grid.bits).view(torch.uint32)
        return {"weight": words, "scales": q.scale, "biases": q.offset}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int, size: int, grid: Grid) -> Quantized:
        codes = unpack_words(tensors["weight"].view(torch.int32), grid.bits, columns)
        grouping = Grouping(columns=columns, size=size)
        return Quantized(
            codes=grouping.split(codes),
            scale=tensors["scales"],
            offset=tensors["biases"],
            grouping=grouping,
            grid=grid,
        )

    def describe(self, layers: Sequence[Packed], others: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        first = layers[0]
        common: dict[str, Any] = {"group_size": first.size, "bits": first.grid.bits, "mode": "affine"}
        own = {
            packed.layer.name: {"group_size": packed.size, "bits": packed.grid.bits}
            for packed in layers
            if (packed.size, packed.grid.bits) != (first.size, first.grid.bits)
        }
        # mlx-lm leaves alone what is `false` here, or has no scales.
        settings = common | own | dict.fromkeys(others, False)
        return {"config.json": {"quantization": settings}}


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [MlxSerializer]
