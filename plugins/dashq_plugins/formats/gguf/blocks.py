"""The blocks of GGUF's types: how codes, scales and mins lie in their bytes."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from dashq import Codebook, Grid, Quantized, SuperBlocks, Zero
from dashq.solving import factor

if TYPE_CHECKING:
    import gguf

Codes = UInt8[Tensor, "blocks groups size"]
Values = Float[Tensor, "blocks groups"]
Bytes = UInt8[Tensor, "blocks bytes"]
Part = UInt8[Tensor, "blocks _"]  # some neighbouring bytes of each block
Numbers = tuple[UInt8[Tensor, "blocks columns"], Values, Values]  # codes, scales, offsets


@dataclass(frozen=True, eq=False, kw_only=True)
class BlockType:
    """One of GGUF's types: its grid, and functions from a block's codes, scales and offsets to bytes and back."""

    name: str
    grid: Grid
    pack: Callable[[Codes, Values, Values, Grid], list[Part]]
    unpack: Callable[[Bytes], Numbers]

    @property
    def kind(self) -> "gguf.GGMLQuantizationType":
        """The type in the words of the package `gguf`."""
        import gguf

        return gguf.GGMLQuantizationType[self.name]

    @property
    def bytes(self) -> int:
        """Bytes of one block."""
        import gguf

        return int(gguf.GGML_QUANT_SIZES[self.kind][1])

    @property
    def columns(self) -> int:
        """Weights of one block."""
        import gguf

        return int(gguf.GGML_QUANT_SIZES[self.kind][0])

    @property
    def groups(self) -> int:
        """Groups of one block: those of a super-block, or one alone."""
        return self.grid.super_blocks.groups if self.grid.super_blocks else 1

    @property
    def size(self) -> int:
        """Weights of one group."""
        return self.columns // self.groups

    def to_bytes(self, q: Quantized) -> UInt8[Tensor, "rows bytes"]:
        """All blocks of a layer, row by row."""
        rows, blocks = len(q.codes), q.codes[0].numel() // self.columns
        if q.codes.is_meta:
            return torch.empty(rows, blocks * self.bytes, dtype=torch.uint8, device="meta")
        codes = q.codes.reshape(-1, self.groups, self.size)
        scale, offset = (values.reshape(-1, self.groups) for values in (q.scale, q.offset))
        return torch.cat(self.pack(codes, scale, offset, q.grid), dim=1).view(rows, blocks * self.bytes)

    def from_bytes(
        self, data: UInt8[Tensor, "rows bytes"]
    ) -> tuple[UInt8[Tensor, "rows groups size"], Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        """The codes, scales and offsets of a layer."""
        codes, scale, offset = self.unpack(data.reshape(-1, self.bytes))
        rows = len(data)
        return codes.reshape(rows, -1, self.size), scale.reshape(rows, -1), offset.reshape(rows, -1)


def _halves(values: Float[Tensor, "blocks values"]) -> Bytes:
    """Float16 numbers, two bytes each."""
    return values.half().contiguous().view(torch.uint8)


def _floats(data: Bytes) -> Float[Tensor, "blocks values"]:
    """The inverse of `_halves`."""
    return data.contiguous().view(torch.float16)


def _spread(codes: UInt8[Tensor, "blocks columns"], bits: int, run: int) -> Bytes:
    """Codes into bytes: of each stretch, the first `run` codes take the lowest bits of as many bytes, and so on."""
    parts = codes.view(len(codes), -1, 8 // bits, run)
    packed = parts[:, :, 0].clone()
    for index in range(1, 8 // bits):
        packed |= parts[:, :, index] << bits * index
    return packed.flatten(1)


def _gather(data: Bytes, bits: int, run: int) -> UInt8[Tensor, "blocks columns"]:
    """The inverse of `_spread`."""
    shifts = bits * torch.arange(8 // bits, dtype=torch.uint8, device=data.device)[:, None]
    return ((data.view(len(data), -1, 1, run) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _pack_plain(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    # Scale; min, where the zero is no code; with five bits 4 bytes of the fifth bits; 16 bytes of the other four.
    q = codes.flatten(1)
    head = [_halves(scale), _halves(offset)] if grid.zero == "real" else [_halves(scale)]
    if grid.bits == 5:
        weights = 1 << torch.arange(8, dtype=torch.int32, device=q.device)
        head.append(((q >> 4).view(len(q), 4, 8) * weights).sum(-1).to(torch.uint8))
    return [*head, _spread(q & 15, 4, 16)]


def _unpack_4_1(data: Bytes) -> Numbers:
    return _gather(data[:, 4:], 4, 16), _floats(data[:, :2]), _floats(data[:, 2:4])


def _unpack_5_1(data: Bytes) -> Numbers:
    return _five_bits(data[:, 4:]), _floats(data[:, :2]), _floats(data[:, 2:4])


def _unpack_4_0(data: Bytes) -> Numbers:
    scale = _floats(data[:, :2])
    return _gather(data[:, 2:], 4, 16), scale, -scale.float() * 8


def _unpack_5_0(data: Bytes) -> Numbers:
    scale = _floats(data[:, :2])
    return _five_bits(data[:, 2:]), scale, -scale.float() * 16


def _five_bits(data: Bytes) -> UInt8[Tensor, "blocks columns"]:
    """Codes of which 4 bytes hold the fifth bits and 16 bytes the others."""
    high = (data[:, :4, None] >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1
    return _gather(data[:, 4:], 4, 16) | (high.flatten(1) << 4)


def _pack_8_0(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    # Signed bytes, which are codes less 128 modulo 256.
    return [_halves(scale), codes.flatten(1) ^ 128]


def _unpack_8_0(data: Bytes) -> Numbers:
    scale = _floats(data[:, :2])
    return data[:, 2:] ^ 128, scale, -scale.float() * 128


def _pack_2_k(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    # 16 bytes with a scale's multiple in the low and a min's in the high half, 64 of codes, and the two units.
    (unit, multiple), (low_unit, low) = _units(scale, offset, grid)
    return [(multiple | low << 4).to(torch.uint8), _spread(codes.flatten(1), 2, 32), _halves(unit), _halves(low_unit)]


def _unpack_2_k(data: Bytes) -> Numbers:
    unit, low_unit = _floats(data[:, 80:82]).float(), _floats(data[:, 82:84]).float()
    multiples = data[:, :16]
    return _gather(data[:, 16:80], 2, 32), unit * (multiples & 15), -(low_unit * (multiples >> 4))


def _pack_3_k(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    assert grid.super_blocks
    unit, multiple = factor(scale, grid.super_blocks, signed=True)
    # 32 bytes with the third bit of each code, 64 with the other two; the multiples of scales, plus 32, have 6 bits: 8
    # bytes with the low four and 4 bytes with the high two; then the unit. A code of 4 stands for 0.
    raised = (multiple + 32).to(torch.uint8)
    q = codes.flatten(1)
    scales = [_spread(raised & 15, 4, 8), _spread(raised >> 4, 2, 4)]
    return [_spread(q >> 2, 1, 32), _spread(q & 3, 2, 32), *scales, _halves(unit)]


def _unpack_3_k(data: Bytes) -> Numbers:
    raised = _gather(data[:, 96:104], 4, 8) | (_gather(data[:, 104:108], 2, 4) << 4)
    scale = _floats(data[:, 108:110]).float() * (raised.float() - 32)
    return _gather(data[:, 32:96], 2, 32) | (_gather(data[:, :32], 1, 32) << 2), scale, -scale * 4


def _pack_4_k(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    return [*_eight_groups(scale, offset, grid), _spread(codes.flatten(1), 4, 32)]


def _unpack_4_k(data: Bytes) -> Numbers:
    return _gather(data[:, 16:], 4, 32), *_of_eight_groups(data[:, :16])


def _pack_5_k(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    # As in Q4_K, but for 32 bytes with the fifth bit of each code before the other four.
    q = codes.flatten(1)
    return [*_eight_groups(scale, offset, grid), _spread(q >> 4, 1, 32), _spread(q & 15, 4, 32)]


def _unpack_5_k(data: Bytes) -> Numbers:
    codes = _gather(data[:, 48:], 4, 32) | (_gather(data[:, 16:48], 1, 32) << 4)
    return codes, *_of_eight_groups(data[:, :16])


def _pack_6_k(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    assert grid.super_blocks
    unit, multiple = factor(scale, grid.super_blocks, signed=True)
    # 128 bytes with the low four bits of each code, 64 with the other two, 16 signed bytes of multiples, the unit. A
    # code of 32 stands for 0.
    q = codes.flatten(1)
    return [_spread(q & 15, 4, 64), _spread(q >> 4, 2, 32), multiple.to(torch.int8).view(torch.uint8), _halves(unit)]


def _unpack_6_k(data: Bytes) -> Numbers:
    multiple = data[:, 192:208].contiguous().view(torch.int8)
    scale = _floats(data[:, 208:210]).float() * multiple
    return _gather(data[:, :128], 4, 64) | (_gather(data[:, 128:192], 2, 32) << 4), scale, -scale * 32


def _pack_iq2_s(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    # The unit; of each pattern's number of 10 bits the low eight, 32 bytes; 32 bytes of signs; 8 bytes with the high
    # two bits of the numbers; 8 bytes of scales, which are unit · (1 + 2 · four bits).
    unit, nibbles = _odd(scale, grid)
    patterns, signs = _patterns(codes, grid)
    high = _spread((patterns >> 8).to(torch.uint8), 2, 1)
    return [_halves(unit), (patterns & 255).to(torch.uint8), signs, high, _spread(nibbles, 4, 1)]


def _unpack_iq2_s(data: Bytes) -> Numbers:
    patterns = data[:, 2:34].int() | _gather(data[:, 66:74], 2, 1).int() << 8
    scale = _floats(data[:, :2]).float() * (1 + 2 * _gather(data[:, 74:82], 4, 1))
    return _codes(patterns, data[:, 34:66], named("IQ2_S").grid), scale, -scale * 0


def _pack_iq3_s(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    # The unit; of each pattern's number of 9 bits the low eight, 64 bytes; 8 bytes with the ninth bits; 32 bytes of
    # signs; 4 bytes of scales, which are unit · (1 + 2 · four bits).
    unit, nibbles = _odd(scale, grid)
    patterns, signs = _patterns(codes, grid)
    high = _spread((patterns >> 8).to(torch.uint8), 1, 1)
    return [_halves(unit), (patterns & 255).to(torch.uint8), high, signs, _spread(nibbles, 4, 1)]


def _unpack_iq3_s(data: Bytes) -> Numbers:
    patterns = data[:, 2:66].int() | _gather(data[:, 66:74], 1, 1).int() << 8
    scale = _floats(data[:, :2]).float() * (1 + 2 * _gather(data[:, 106:110], 4, 1))
    return _codes(patterns, data[:, 74:106], named("IQ3_S").grid), scale, -scale * 0


def _pack_iq4_xs(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    # The unit; the multiples of scales, plus 32, have 6 bits: 2 bytes with the high two and 4 bytes with the low four;
    # 128 bytes of codes.
    assert grid.super_blocks
    unit, multiple = factor(scale, grid.super_blocks, signed=True)
    raised = (multiple + 32).to(torch.uint8)
    return [_halves(unit), _spread(raised >> 4, 2, 1), _spread(raised & 15, 4, 1), _spread(codes.flatten(1), 4, 16)]


def _unpack_iq4_xs(data: Bytes) -> Numbers:
    raised = _gather(data[:, 4:8], 4, 1) | _gather(data[:, 2:4], 2, 1) << 4
    scale = _floats(data[:, :2]).float() * (raised.float() - 32)
    return _gather(data[:, 8:], 4, 16), scale, -scale * 0


def _pack_iq4_nl(codes: Codes, scale: Values, offset: Values, grid: Grid) -> list[Part]:
    return [_halves(scale), _spread(codes.flatten(1), 4, 16)]


def _unpack_iq4_nl(data: Bytes) -> Numbers:
    scale = _floats(data[:, :2]).float()
    return _gather(data[:, 2:], 4, 16), scale, -scale * 0


def _odd(scale: Values, grid: Grid) -> tuple[Float[Tensor, "blocks 1"], UInt8[Tensor, "blocks groups"]]:
    """Units, and n of the odd numbers 2 n + 1 that they are multiplied with."""
    assert grid.super_blocks
    unit, multiple = factor(scale, grid.super_blocks)
    return unit, (multiple >> 1).to(torch.uint8)


def _patterns(codes: Codes, grid: Grid) -> tuple[Int[Tensor, "blocks patterns"], Part]:
    """The numbers of the codebook's patterns, and bytes of signs, a set bit for each weight below zero."""
    codebook = grid.codebook
    assert codebook
    q, middle = codes.flatten(1).int(), len(codebook.levels) // 2
    bits = 1 << torch.arange(8, dtype=torch.int32, device=q.device)
    signs = ((q < middle).view(len(q), -1, 8) * bits).sum(-1).to(torch.uint8)
    sizes = torch.where(q < middle, middle - 1 - q, q - middle).view(len(q), -1, codebook.width)
    numbers, lookup = _lookup(codebook, middle, q.device)
    return lookup[(sizes * numbers).sum(-1)].int(), signs


def _codes(patterns: Int[Tensor, "blocks patterns"], signs: Part, grid: Grid) -> UInt8[Tensor, "blocks columns"]:
    """The inverse of `_patterns`."""
    codebook = grid.codebook
    assert codebook
    table = torch.frombuffer(bytearray(codebook.patterns), dtype=torch.uint8).to(patterns.device)
    q = table.view(-1, codebook.width)[patterns].flatten(1)
    negative = _gather(signs, 1, 1).bool()
    return torch.where(negative, len(codebook.levels) - 1 - q, q)


def _lookup(
    codebook: Codebook, middle: int, device: torch.device
) -> tuple[Int[Tensor, " width"], Int[Tensor, " numbers"]]:
    """Factors that make one number of a pattern's sizes, and the pattern of each such number."""
    sizes = torch.frombuffer(bytearray(codebook.patterns), dtype=torch.uint8).view(-1, codebook.width).int() - middle
    factors = middle ** torch.arange(codebook.width, dtype=torch.int32)
    lookup = torch.zeros(middle**codebook.width, dtype=torch.int32)
    lookup[(sizes * factors).sum(-1)] = torch.arange(len(sizes), dtype=torch.int32)
    return factors.to(device), lookup.to(device)


def _eight_groups(scale: Values, offset: Values, grid: Grid) -> list[Part]:
    (unit, multiple), (low_unit, low) = _units(scale, offset, grid)
    # The two units, and 12 bytes of multiples of 6 bits. Of the multiples the first four scales and mins take the low
    # six bits of 4 bytes each; the last four of both share 4 bytes with their low halves, and their high two bits fill
    # up the first eight.
    s, m = multiple.to(torch.uint8), low.to(torch.uint8)
    first = [x[:, :4] | (x[:, 4:] >> 4) << 6 for x in (s, m)]
    return [_halves(unit), _halves(low_unit), *first, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4]


def _of_eight_groups(data: Bytes) -> tuple[Values, Values]:
    """The inverse of `_eight_groups`."""
    unit, low_unit = _floats(data[:, :2]).float(), _floats(data[:, 2:4]).float()
    a, b, c = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    s = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], 1)
    m = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], 1)
    return unit * s, -(low_unit * m)


def _units(scale: Values, offset: Values, grid: Grid) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The units of scales and of mins, and the whole numbers that they are multiplied with."""
    assert grid.super_blocks
    return factor(scale, grid.super_blocks), factor(-offset, grid.super_blocks)


def _grid(bits: int, zero: Zero) -> Grid:
    return Grid(bits=bits, dtype=torch.float16, zero=zero, negative_scales=zero == "symmetric")


def _k_grid(bits: int, super_blocks: SuperBlocks) -> Grid:
    signed = super_blocks.signed
    zero: Zero = "symmetric" if signed else "real"
    return Grid(bits=bits, dtype=torch.float32, zero=zero, negative_scales=signed, super_blocks=super_blocks)


def _codebook(name: str, unit: int) -> Codebook:
    """The codebook of a type whose weights have signs of their own: the table in `gguf`, in multiples of 1 / unit."""
    kind = getattr(importlib.import_module("gguf.quants"), name)
    kind.init_grid()
    sizes = torch.from_numpy(kind.grid).reshape(kind.grid_shape).float() / unit
    levels = sizes.unique()
    patterns = (torch.searchsorted(levels, sizes) + len(levels)).to(torch.uint8)
    both = (*(-levels.flip(0)).tolist(), *levels.tolist())
    return Codebook(levels=both, patterns=patterns.numpy().tobytes(), width=sizes.shape[1], signs=True)


def _nonlinear() -> Codebook:
    """The levels of IQ4_NL and IQ4_XS, of which every weight has its own."""
    kind = importlib.import_module("gguf.quants").IQ4_NL
    return Codebook(levels=tuple(float(level) for level in kind.kvalues), patterns=bytes(range(16)))


def _iq_grid(bits: int, super_blocks: SuperBlocks, codebook: Codebook) -> Grid:
    signed = super_blocks.signed
    return Grid(
        bits=bits,
        dtype=torch.float32,
        zero="symmetric",
        negative_scales=signed,
        super_blocks=super_blocks,
        codebook=codebook,
    )


_ODD_SIXTEEN = SuperBlocks(groups=16, size=16, top=31, odd=True)
_ODD_EIGHT = SuperBlocks(groups=8, size=32, top=31, odd=True)
# One group alone with a scale of either sign: its few multiples of a float16 unit are float16 numbers themselves.
_ALONE = SuperBlocks(groups=1, size=32, top=1, signed=True)
_SIGNED_EIGHT = SuperBlocks(groups=8, size=32, top=31, signed=True)
_SIXTEEN = SuperBlocks(groups=16, size=16, top=15)
_SIGNED = SuperBlocks(groups=16, size=16, top=31, signed=True)
_BYTES = SuperBlocks(groups=16, size=16, top=127, signed=True)
_EIGHT = SuperBlocks(groups=8, size=32, top=63)
TYPES: Mapping[str, BlockType] = {
    block_type.name: block_type
    for block_type in (
        BlockType(name="Q4_0", grid=_grid(4, "symmetric"), pack=_pack_plain, unpack=_unpack_4_0),
        BlockType(name="Q4_1", grid=_grid(4, "real"), pack=_pack_plain, unpack=_unpack_4_1),
        BlockType(name="Q5_0", grid=_grid(5, "symmetric"), pack=_pack_plain, unpack=_unpack_5_0),
        BlockType(name="Q5_1", grid=_grid(5, "real"), pack=_pack_plain, unpack=_unpack_5_1),
        BlockType(name="Q8_0", grid=_grid(8, "symmetric"), pack=_pack_8_0, unpack=_unpack_8_0),
        BlockType(name="Q2_K", grid=_k_grid(2, _SIXTEEN), pack=_pack_2_k, unpack=_unpack_2_k),
        BlockType(name="Q3_K", grid=_k_grid(3, _SIGNED), pack=_pack_3_k, unpack=_unpack_3_k),
        BlockType(name="Q4_K", grid=_k_grid(4, _EIGHT), pack=_pack_4_k, unpack=_unpack_4_k),
        BlockType(name="Q5_K", grid=_k_grid(5, _EIGHT), pack=_pack_5_k, unpack=_unpack_5_k),
        BlockType(name="Q6_K", grid=_k_grid(6, _BYTES), pack=_pack_6_k, unpack=_unpack_6_k),
    )
}
_BY_GRID = {block_type.grid: block_type for block_type in TYPES.values()}


@cache
def _codebook_types() -> Mapping[str, BlockType]:
    """The types with codebooks, which the package `gguf` is imported for: plans of other types do without."""
    two, three = _iq_grid(2, _ODD_SIXTEEN, _codebook("IQ2_S", 8)), _iq_grid(3, _ODD_EIGHT, _codebook("IQ3_S", 1))
    four, plain = (_iq_grid(4, blocks, _nonlinear()) for blocks in (_SIGNED_EIGHT, _ALONE))
    types = (
        BlockType(name="IQ2_S", grid=two, pack=_pack_iq2_s, unpack=_unpack_iq2_s),
        BlockType(name="IQ3_S", grid=three, pack=_pack_iq3_s, unpack=_unpack_iq3_s),
        BlockType(name="IQ4_XS", grid=four, pack=_pack_iq4_xs, unpack=_unpack_iq4_xs),
        BlockType(name="IQ4_NL", grid=plain, pack=_pack_iq4_nl, unpack=_unpack_iq4_nl),
    )
    return {block_type.name: block_type for block_type in types}


def named(name: str) -> BlockType:
    """The type of that name."""
    return TYPES[name] if name in TYPES else _codebook_types()[name]


def type_of(grid: Grid) -> BlockType:
    """The type whose blocks hold this grid, which is no other type's."""
    if grid.codebook:
        return next(block_type for block_type in _codebook_types().values() if block_type.grid == grid)
    return _BY_GRID[grid]
