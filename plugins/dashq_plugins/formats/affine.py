"""Words of codes with a real zero for each group, as the formats of MLX and of transformers share them."""

from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq import Grid, Grouping, Quantized
from dashq_plugins.formats.words import flat_codes, pack_words, unpack_words


def pack_affine(quantized: Quantized, offsets: str) -> Mapping[str, Tensor]:
    """The tensors `weight`, words of codes row by row, `scales`, and one of the name `offsets`."""
    q = quantized
    words = pack_words(flat_codes(q), q.grid.bits).view(torch.uint32)
    return {"weight": words, "scales": q.scale, offsets: q.offset}


def unpack_affine(
    tensors: Mapping[str, Shaped[Tensor, "..."]], offsets: str, columns: int, size: int, grid: Grid
) -> Quantized:
    """The inverse of `pack_affine`."""
    codes = unpack_words(tensors["weight"].view(torch.int32), grid.bits, columns)
    grouping = Grouping(columns=columns, size=size)
    return Quantized(
        codes=grouping.split(codes), scale=tensors["scales"], offset=tensors[offsets], grouping=grouping, grid=grid
    )
