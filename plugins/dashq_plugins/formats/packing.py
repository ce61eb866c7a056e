"""Bit-packing: codes of 1 to 8 bits as one little-endian bit stream per row."""

from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

# Eight codes of b bits fill exactly b bytes, so whole bytes can be handled eight codes at a time.
EIGHT = 8


def packed_width(columns: int, bits: int) -> int:
    """Bytes per row for `columns` codes of `bits` bits, the last eight codes filled up with zeros."""
    return -(-columns // EIGHT) * bits


def pack_bits(codes: UInt8[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Code j of a row goes to bits j*b … j*b + b - 1 of the row's stream, lowest bit first."""
    rows, columns = codes.shape
    if codes.is_meta:  # plans ask for shapes alone, and many times
        return codes.new_empty(rows, packed_width(columns, bits))
    eights = functional.pad(codes, (0, -columns % EIGHT)).view(rows, -1, EIGHT)
    stream = eights.new_zeros(rows, eights.shape[1], bits)
    for index in range(EIGHT):
        byte, shift = divmod(index * bits, 8)
        stream[..., byte] |= eights[..., index] << shift
        if shift + bits > 8:  # the rest goes to the next byte
            stream[..., byte + 1] |= eights[..., index] >> (8 - shift)
    return stream.view(rows, packed_width(columns, bits))


def unpack_bits(packed: UInt8[Tensor, "rows bytes"], bits: int, columns: int) -> UInt8[Tensor, "rows columns"]:
    """The inverse of `pack_bits`."""
    stream = packed.reshape(packed.shape[0], -1, bits)
    eights = stream.new_empty(*stream.shape[:2], EIGHT)
    for index in range(EIGHT):
        byte, shift = divmod(index * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code |= stream[..., byte + 1] << (8 - shift)
        eights[..., index] = code.bitwise_and_((1 << bits) - 1)
    return eights.flatten(1)[:, :columns].contiguous()
