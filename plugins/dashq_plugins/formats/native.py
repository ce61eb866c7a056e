"""The native format: bit-packed codes with a real-valued scale and zero per group."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from dashq import Grid, Grouping, PlanError, Quantized, Serializer, hookimpl
from dashq_plugins.formats.packing import pack_bits, unpack_bits
from dashq_plugins.formats.words import flat_codes

OPENING = """\
import dashq  # pip install dashq; lets transformers open it
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")
"""


class NativeSerializer(Serializer):
    """1 to 8 bits, any group size, each layer its own; loads in transformers after `import dashq`.

    Tensors of a layer: `codes` uint8 [rows, bytes], one little-endian bit stream per row in group order;
    `scale` and `offset` [rows, groups] of type `dtype`; `order` int32 [columns] where the grouper reordered
    columns. The weight is scale · code + offset: the zero is the real number `offset`.
    """

    name = "dashq"
    holds_embeddings = True
    holds_head = True
    openings: ClassVar[Mapping[str, str]] = {"transformers, with dashq": OPENING}
    dtype: Literal["float16", "bfloat16"] = "float16"

    def grid(self, bits: int) -> Grid:
        if not 1 <= bits <= 8:
            raise PlanError(f"the dashq format holds 1 to 8 bits, not {bits}")
        return Grid(bits=bits, dtype=getattr(torch, self.dtype))

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        q = quantized
        tensors = {"codes": pack_bits(flat_codes(q), q.grid.bits), "scale": q.scale, "offset": q.offset}
        return tensors if q.grouping.order is None else tensors | {"order": q.grouping.order.int()}

    def unpack(self, tensors: Mapping[str, Shaped[Tensor, "..."]], columns: int, size: int, grid: Grid) -> Quantized:
        order = tensors.get("order")
        grouping = Grouping(columns=columns, size=size, order=order)
        codes = unpack_bits(tensors["codes"], grid.bits, columns)
        # Filling up is by repetition on both sides, so a short last group round-trips bit by bit.
        filled = Grouping(columns=columns, size=size).split(codes)
        return Quantized(codes=filled, scale=tensors["scale"], offset=tensors["offset"], grouping=grouping, grid=grid)

    def rows(
        self, tensors: Mapping[str, Shaped[Tensor, "..."]], index: Int[Tensor, " rows"]
    ) -> Mapping[str, Shaped[Tensor, "..."]]:
        return {name: tensor if name == "order" else tensor[index] for name, tensor in tensors.items()}


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [NativeSerializer]
