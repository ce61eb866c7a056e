"""The blocks of GGUF's types: how codes, scales and mins lie in their bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from dashq import Grid, Quantized
from dashq.data import SuperBlocks, Zero
from dashq.solving.super_blocks import factor


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockType:
    """One of GGUF's types: its grid, its block, and functions from numbers to bytes and back.

    `pack` takes codes, scales and offsets of shapes [blocks groups size] and [blocks groups]; `unpack` returns them.
    """

    name: str
    bytes: int
    grid: Grid
    groups: int
    size: int
    pack: Callable[[Tensor, Tensor, Tensor, Grid], list[Tensor]]
    unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

    @property
    def columns(self) -> int:
        """Weights of one block."""
        return self.groups * self.size

    def to_bytes(self, q: Quantized) -> UInt8[Tensor, "rows bytes"]:
        """All blocks of a layer, row by row."""
        rows, blocks = len(q.codes), q.codes[0].numel() // self.columns
        if q.codes.is_meta:
            return torch.empty(rows, blocks * self.bytes, dtype=torch.uint8, device="meta")
        codes = q.codes.reshape(-1, self.groups, self.size)
        scale, offset = (values.reshape(-1, self.groups) for values in (q.scale, q.offset))
        return torch.cat(self.pack(codes, scale, offset, q.grid), dim=1).view(rows, blocks * self.bytes)

    def from_bytes(self, data: UInt8[Tensor, "rows bytes"]) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [rows groups size], scales and offsets [rows groups]."""
        codes, scale, offset = self.unpack(data.reshape(-1, self.bytes))
        rows = len(data)
        return codes.reshape(rows, -1, self.size), scale.reshape(rows, -1), offset.reshape(rows, -1)


def _halves(values: Tensor) -> Tensor:
    return values.half().contiguous().view(torch.uint8)


def _floats(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.float16)


def _spread(codes: Tensor, bits: int, run: int) -> Tensor:
    """Codes into bytes: of each stretch, the first `run` codes take the lowest bits of as many bytes, and so on."""
    parts = codes.view(len(codes), -1, 8 // bits, run)
    packed = parts[:, :, 0].clone()
    for index in range(1, 8 // bits):
        packed |= parts[:, :, index] << bits * index
    return packed.flatten(1)


def _gather(data: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of `_spread`."""
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=data.device)[:, None]
    return ((data.view(len(data), -1, 1, run) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _pack_plain(codes: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> list[Tensor]:
    q = codes.flatten(1)
    head = [_halves(scale), _halves(offset)]
    if grid.bits == 5:
        weights = 1 << torch.arange(8, dtype=torch.int32, device=q.device)
        head.append(((q >> 4).view(len(q), 4, 8) * weights).sum(-1).to(torch.uint8))
    return [*head, _spread(q & 15, 4, 16)]


def _unpack_4_1(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _gather(data[:, 4:], 4, 16), _floats(data[:, :2]), _floats(data[:, 2:4])


def _unpack_5_1(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    high = (data[:, 4:8, None] >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1
    return _gather(data[:, 8:], 4, 16) | (high.flatten(1) << 4), _floats(data[:, :2]), _floats(data[:, 2:4])


def _pack_2_k(codes: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> list[Tensor]:
    (unit, multiple), (low_unit, low) = _units(scale, offset, grid)
    return [(multiple | low << 4).to(torch.uint8), _spread(codes.flatten(1), 2, 32), _halves(unit), _halves(low_unit)]


def _unpack_2_k(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    unit, low_unit = _floats(data[:, 80:82]).float(), _floats(data[:, 82:84]).float()
    multiples = data[:, :16]
    return _gather(data[:, 16:80], 2, 32), unit * (multiples & 15), -(low_unit * (multiples >> 4))


def _pack_3_k(codes: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> list[Tensor]:
    assert grid.super_blocks
    unit, multiple = factor(scale, grid.super_blocks, signed=True)
    raised = (multiple + 32).to(torch.uint8)
    q = codes.flatten(1)
    scales = [_spread(raised & 15, 4, 8), _spread(raised >> 4, 2, 4)]
    return [_spread(q >> 2, 1, 32), _spread(q & 3, 2, 32), *scales, _halves(unit)]


def _unpack_3_k(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    raised = _gather(data[:, 96:104], 4, 8) | (_gather(data[:, 104:108], 2, 4) << 4)
    scale = _floats(data[:, 108:110]).float() * (raised.float() - 32)
    return _gather(data[:, 32:96], 2, 32) | (_gather(data[:, :32], 1, 32) << 2), scale, -scale * 4


def _pack_4_k(codes: Tensor, scale: Tensor, offset: Tensor, grid: Grid) -> list[Tensor]:
    (unit, multiple), (low_unit, low) = _units(scale, offset, grid)
    s, m = multiple.to(torch.uint8), low.to(torch.uint8)
    first = [x[:, :4] | (x[:, 4:] >> 4) << 6 for x in (s, m)]
    scales = [*first, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4]
    return [_halves(unit), _halves(low_unit), *scales, _spread(codes.flatten(1), 4, 32)]


def _unpack_4_k(data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    unit, low_unit = _floats(data[:, :2]).float(), _floats(data[:, 2:4]).float()
    a, b, c = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    s = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], 1)
    m = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], 1)
    return _gather(data[:, 16:], 4, 32), unit * s, -(low_unit * m)


def _units(scale: Tensor, offset: Tensor, grid: Grid) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    assert grid.super_blocks
    return factor(scale, grid.super_blocks), factor(-offset, grid.super_blocks)


def _plain(
    name: str, size_in_bytes: int, bits: int, unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
) -> BlockType:
    grid = Grid(bits=bits, dtype=torch.float16)
    return BlockType(name=name, bytes=size_in_bytes, grid=grid, groups=1, size=32, pack=_pack_plain, unpack=unpack)


def _super(
    name: str,
    size_in_bytes: int,
    bits: int,
    blocks: SuperBlocks,
    pack: Callable[[Tensor, Tensor, Tensor, Grid], list[Tensor]],
    unpack: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
) -> BlockType:
    zero: Zero = "symmetric" if blocks.signed else "real"
    grid = Grid(bits=bits, dtype=torch.float32, zero=zero, negative_scales=blocks.signed, super_blocks=blocks)
    return BlockType(
        name=name, bytes=size_in_bytes, grid=grid, groups=blocks.groups, size=blocks.size, pack=pack, unpack=unpack
    )


_SIXTEEN = SuperBlocks(groups=16, size=16, top=15)
_SIGNED = SuperBlocks(groups=16, size=16, top=31, signed=True)
_EIGHT = SuperBlocks(groups=8, size=32, top=63)
TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        _plain("Q4_1", 20, 4, _unpack_4_1),
        _plain("Q5_1", 24, 5, _unpack_5_1),
        _super("Q2_K", 84, 2, _SIXTEEN, _pack_2_k, _unpack_2_k),
        _super("Q3_K", 110, 3, _SIGNED, _pack_3_k, _unpack_3_k),
        _super("Q4_K", 144, 4, _EIGHT, _pack_4_k, _unpack_4_k),
    )
}
