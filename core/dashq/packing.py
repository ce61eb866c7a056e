"""Bit-packing: codes of 1 to 8 bits as one little-endian bit stream per row."""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

# Eight codes of b bits fill exactly b bytes, so eight codes at a time travel through one 64-bit word.
CODES_PER_WORD = 8


def packed_width(columns: int, bits: int) -> int:
    """Bytes per row for `columns` codes of `bits` bits, the last word of eight codes filled up with zeros."""
    return -(-columns // CODES_PER_WORD) * bits


def pack_bits(codes: UInt8[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Code j of a row goes to bits j*b … j*b + b - 1 of the row's stream, lowest bit first."""
    rows, columns = codes.shape
    eights = functional.pad(codes, (0, -columns % CODES_PER_WORD)).view(rows, -1, CODES_PER_WORD)
    words = eights[..., 0].long()
    for index in range(1, CODES_PER_WORD):
        words = words | (eights[..., index].long() << (bits * index))
    return words.view(torch.uint8).view(rows, -1, 8)[..., :bits].reshape(rows, packed_width(columns, bits))


def unpack_bits(packed: UInt8[Tensor, "rows bytes"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The inverse of `pack_bits`."""
    stream = packed.reshape(packed.shape[0], -1, bits)
    words = functional.pad(stream, (0, 8 - bits)).flatten(1).view(torch.int64)
    mask = (1 << bits) - 1
    codes = [((words >> (bits * index)) & mask).to(torch.uint8) for index in range(CODES_PER_WORD)]
    return torch.stack(codes, dim=-1).flatten(1)[:, :columns].contiguous()
