"""The programs that numba compiles for the kernel "lanes".

A vector unit takes the codes of one column and of rows side by side from their bytes, converts and multiplies them in
one go, and nothing is summed across its lanes.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, no_type_check

import numba
import numpy

from dashq.runtime.lanes_layout import CHUNK, LANES, planes

Program = Callable[..., None]
PLAIN, FLOAT16, BFLOAT16 = 0, 1, 2  # forms of numbers: a type of numpy's, or the bits of a type that numpy may lack


def _compiled(program: Program) -> Program:
    """For all threads; several sums of products may be contracted, but not reordered.

    What is compiled stays on disk, unless numba may write neither beside this module nor to its folder for caches.
    """
    options: dict[str, Any] = {"parallel": True, "nogil": True, "fastmath": {"contract"}}
    try:
        compiled: Program = numba.njit(cache=True, **options)(program)
    except RuntimeError:  # it found no such folder
        compiled = numba.njit(**options)(program)
    return compiled


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


@no_type_check
@numba.njit(inline="always")
def _wide(value, form):
    """A number, in float32, or in the form `FLOAT16` or `BFLOAT16` the bits of one in that type, a finite one."""
    u32 = numpy.uint32
    if form == BFLOAT16:
        return numpy.uint32(u32(value) << u32(16)).view(numpy.float32)
    if form != FLOAT16:
        return numpy.float32(value)
    bits = u32(value)
    # Exponents of float16 are 112 less; subnormal numbers are right as well.
    size = numpy.float32(numpy.uint32(u32(bits & u32(0x7FFF)) << u32(13)).view(numpy.float32) * numpy.float32(2.0**112))
    sign = u32(u32(bits & u32(0x8000)) << u32(16))
    return numpy.uint32(numpy.float32(size).view(numpy.uint32) | sign).view(numpy.float32)


@no_type_check
@numba.njit(inline="always")
def _offset(value, form, zero, scale):
    """The offset o of a group, or where `zero` is stored in its place the scale times it, o = -s z."""
    number = _wide(value, form)
    return numpy.float32(-scale * number) if zero else number


@no_type_check
@numba.njit(inline="always")
def _narrow(number):
    """The bits in bfloat16 of the nearest number, or of the even one of two."""
    bits, u32 = numpy.float32(number).view(numpy.uint32), numpy.uint32
    up = u32(u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1)))
    return numpy.uint16(u32(bits + up) >> u32(16))


@cache
def product(bits: int, scale_form: int, offset_form: int, zero: bool) -> Program:
    """y = Σ over groups of s (Σ q x) + o (Σ x), for codes of so many bits.

    It takes `x` [tokens, groups, size], `codes` [tiles, groups, chunks, bits, lanes], `scale` and `offset` [groups,
    rows], and `out` [tokens, rows], which it fills; numbers in float32, scales and offsets as `_wide` and `_offset`
    read them.
    """
    first, second, third = (*planes(bits), 0, 0)[:3]
    lanes, columns = LANES, CHUNK  # names of its own, of which numba's key on disk has the values

    @no_type_check
    @_compiled
    def multiply(x, codes, scale, offset, out):
        tiles, groups, chunks = codes.shape[:3]
        for tile in numba.prange(tiles):
            begin, end = tile * lanes, (tile + 1) * lanes
            total, part = numpy.empty(lanes, numpy.float32), numpy.empty(lanes, numpy.float32)
            for token in range(len(x)):
                for lane in range(lanes):
                    total[lane] = 0
                for group in range(groups):
                    inputs = numpy.float32(0)
                    for lane in range(lanes):
                        part[lane] = 0
                    for chunk in range(chunks):
                        line, at = codes[tile, group, chunk], chunk * columns
                        # Written out, so that a chunk is one step of the loop over lanes.
                        x0, x1 = x[token, group, at], x[token, group, at + 1]
                        x2, x3 = x[token, group, at + 2], x[token, group, at + 3]
                        x4, x5 = x[token, group, at + 4], x[token, group, at + 5]
                        x6, x7 = x[token, group, at + 6], x[token, group, at + 7]
                        inputs += x0 + x1 + x2 + x3 + x4 + x5 + x6 + x7
                        for lane in range(lanes):
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
                    for lane in range(lanes):
                        own = _wide(scales[lane], scale_form)
                        shift = _offset(offsets[lane], offset_form, zero, own)
                        total[lane] += part[lane] * own + inputs * shift
                out[token, begin:end] = total

    program: Program = multiply
    return program


@cache
def unpacking(bits: int, scale_form: int, offset_form: int, zero: bool, narrow: bool) -> Program:
    """W = s q + o, for codes of so many bits.

    It takes `codes`, `scale` and `offset` as `product` does, and fills `out` [groups, chunks, 8, rows], which is of
    float32, or of the bits of bfloat16 if `narrow`.
    """
    first, second, third = (*planes(bits), 0, 0)[:3]
    lanes, columns = LANES, CHUNK  # names of its own, of which numba's key on disk has the values

    @no_type_check
    @_compiled
    def unpack(codes, scale, offset, out):
        tiles, groups, chunks = codes.shape[:3]
        for group in numba.prange(groups):
            # A group's columns are written from their first row to their last: few places at a time, in order.
            for tile in range(tiles):
                begin, end = tile * lanes, (tile + 1) * lanes
                scales, offsets = scale[group, begin:end], offset[group, begin:end]
                for chunk in range(chunks):
                    line = codes[tile, group, chunk]
                    for column in range(columns):
                        weights = out[group, chunk, column, begin:end]
                        for lane in range(lanes):
                            number = _number(line, column, lane, first, second, third)
                            own = _wide(scales[lane], scale_form)
                            shift = _offset(offsets[lane], offset_form, zero, own)
                            weight = number * own + shift
                            if narrow:
                                weights[lane] = _narrow(weight)
                            else:
                                weights[lane] = weight

    program: Program = unpack
    return program
