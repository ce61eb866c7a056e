"""The programs that numba compiles for the kernel "lanes".

A vector unit takes the codes of one column and of rows side by side from their bytes, converts and multiplies them in
one go, and nothing is summed across its lanes.
"""

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import numba
import numpy

from dashq.runtime.lanes_layout import CHUNK, LANES, planes

Program = Callable[..., None]

# For all threads; several sums of products may be contracted, but not reordered. What is compiled stays on disk.
_compiled = numba.njit(parallel=True, nogil=True, fastmath={"contract"}, cache=True)


@no_type_check  # tests check shapes around every other function, which is no program then
@numba.njit(inline="always")
def _number(line, column, lane, first, second, third):
    """The code of a row and a column of a chunk as a number; `line` has the chunk's bytes, [bits, lanes]."""
    # All in bytes: numba computes in 64 bits otherwise, of which a vector has an eighth as many.
    u8 = numpy.uint8
    code = u8(u8(line[column * first // 8, lane] >> u8(column * first % 8)) & u8(2**first - 1))
    if second:
        byte = line[first + column * second // 8, lane]
        code = u8(code | u8(u8(u8(byte >> u8(column * second % 8)) & u8(2**second - 1)) << u8(first)))
    if third:
        byte = line[first + second + column * third // 8, lane]
        code = u8(code | u8(u8(u8(byte >> u8(column * third % 8)) & u8(2**third - 1)) << u8(first + second)))
    return numpy.float32(code)


@cache
def product(bits: int) -> Program:
    """y = Σ over groups of s (Σ q x) + o (Σ x), for codes of so many bits.

    It takes `x` [tokens, groups, size], `codes` [tiles, groups, chunks, bits, lanes], `scale` and `offset` [groups,
    rows], and `out` [tokens, rows], which it fills; all but codes in float32.
    """
    first, second, third = (*planes(bits), 0, 0)[:3]

    @no_type_check
    @_compiled
    def multiply(x, codes, scale, offset, out):
        tiles, groups, chunks = codes.shape[:3]
        for tile in numba.prange(tiles):
            begin, end = tile * LANES, (tile + 1) * LANES
            total, part = numpy.empty(LANES, numpy.float32), numpy.empty(LANES, numpy.float32)
            for token in range(len(x)):
                for lane in range(LANES):
                    total[lane] = 0
                for group in range(groups):
                    inputs = numpy.float32(0)
                    for lane in range(LANES):
                        part[lane] = 0
                    for chunk in range(chunks):
                        line, at = codes[tile, group, chunk], chunk * CHUNK
                        # Written out, so that a chunk is one step of the loop over lanes.
                        x0, x1 = x[token, group, at], x[token, group, at + 1]
                        x2, x3 = x[token, group, at + 2], x[token, group, at + 3]
                        x4, x5 = x[token, group, at + 4], x[token, group, at + 5]
                        x6, x7 = x[token, group, at + 6], x[token, group, at + 7]
                        inputs += x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7
                        for lane in range(LANES):
                            part[lane] += (
                                _number(line, 0, lane, first, second, third) * x0
                                + _number(line, 1, lane, first, second, third) * x1
                                + _number(line, 2, lane, first, second, third) * x2
                                + _number(line, 3, lane, first, second, third) * x3
                                + _number(line, 4, lane, first, second, third) * x4
                                + _number(line, 5, lane, first, second, third) * x5
                                + _number(line, 6, lane, first, second, third) * x6
                                + _number(line, 7, lane, first, second, third) * x7
                            )
                    scales, offsets = scale[group, begin:end], offset[group, begin:end]
                    for lane in range(LANES):
                        total[lane] += part[lane] * scales[lane] + inputs * offsets[lane]
                out[token, begin:end] = total

    program: Program = multiply
    return program


@cache
def unpacking(bits: int) -> Program:
    """W = s q + o, for codes of so many bits.

    It takes `codes`, `scale` and `offset` as `product` does, and fills `out` [groups, chunks, 8, rows].
    """
    first, second, third = (*planes(bits), 0, 0)[:3]

    @no_type_check
    @_compiled
    def unpack(codes, scale, offset, out):
        tiles, groups, chunks = codes.shape[:3]
        for tile in numba.prange(tiles):
            begin, end = tile * LANES, (tile + 1) * LANES
            for group in range(groups):
                scales, offsets = scale[group, begin:end], offset[group, begin:end]
                for chunk in range(chunks):
                    line = codes[tile, group, chunk]
                    for column in range(CHUNK):
                        weights = out[group, chunk, column, begin:end]
                        for lane in range(LANES):
                            number = _number(line, column, lane, first, second, third)
                            weights[lane] = number * scales[lane] + offsets[lane]

    program: Program = unpack
    return program
