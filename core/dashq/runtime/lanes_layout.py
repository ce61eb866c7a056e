"""The layout of codes for the kernel "lanes".

A chunk of 8 columns has as many bytes for each row as a code has bits, and 64 rows lie side by side. Codes lie in
planes of 1, 2, 4 or 8 of their bits, the lowest first, so that none crosses the border of a byte: 3 bits are a plane
of 2 and one of 1.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

LANES = 64  # rows side by side
CHUNK = 8  # columns
PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def planes(bits: int) -> tuple[int, ...]:
    """The bits of each plane of codes."""
    return PLANES.get(bits, (bits,))


def in_planes(
    codes: UInt8[Tensor, "tiles groups chunks 8 lanes"], bits: int
) -> UInt8[Tensor, "tiles groups chunks bits lanes"]:
    """Codes as the bytes of each chunk: plane by plane, with columns one after the other from the lowest bits up."""
    lines, done = [], 0
    for width in planes(bits):
        plane = codes >> done & 2**width - 1
        each = 8 // width  # columns in a byte
        for first in range(0, CHUNK, each):
            line = torch.zeros_like(codes[..., 0, :])
            for place in range(each):
                line |= plane[..., first + place, :] << width * place
            lines.append(line)
        done += width
    return torch.stack(lines, dim=-2)


def from_planes(
    packed: UInt8[Tensor, "tiles groups chunks bits lanes"], bits: int
) -> UInt8[Tensor, "tiles groups chunks 8 lanes"]:
    """The inverse of `in_planes`."""
    codes = packed.new_zeros(*packed.shape[:3], CHUNK, packed.shape[4])
    done = 0  # bits of each code, and bytes of each chunk
    for width in planes(bits):
        for column in range(CHUNK):
            byte, place = divmod(column * width, 8)
            codes[..., column, :] |= (packed[..., done + byte, :] >> place & 2**width - 1) << done
        done += width
    return codes
