"""The layout of codes for the kernel "lanes".

A chunk of 8 columns has as many bytes for each row as a code has bits, and 64 rows lie side by side. A row's codes lie
in its bytes one after the other, from the lowest bits up: of 3 bits, the third code has the highest two of the first
byte and the lowest one of the second.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

LANES = 64  # rows side by side
CHUNK = 8  # columns


def to_bytes(
    codes: UInt8[Tensor, "tiles groups chunks 8 lanes"], bits: int
) -> UInt8[Tensor, "tiles groups chunks bits lanes"]:
    """The bytes of each chunk."""
    packed = codes.new_zeros(*codes.shape[:3], bits, codes.shape[4])
    for column in range(CHUNK):
        byte, place = divmod(column * bits, 8)
        packed[..., byte, :] |= codes[..., column, :] << place
        if place + bits > 8:
            packed[..., byte + 1, :] |= codes[..., column, :] >> 8 - place
    return packed


def from_bytes(
    packed: UInt8[Tensor, "tiles groups chunks bits lanes"], bits: int
) -> UInt8[Tensor, "tiles groups chunks 8 lanes"]:
    """The inverse of `to_bytes`."""
    codes = []
    for column in range(CHUNK):
        byte, place = divmod(column * bits, 8)
        code = packed[..., byte, :] >> place
        if place + bits > 8:
            code |= packed[..., byte + 1, :] << 8 - place
        codes.append(code & 2**bits - 1)
    return torch.stack(codes, dim=-2)
