"""The programs that numba compiles for the kernel "lanes".

A vector unit takes the codes of one column and of rows side by side from their bytes, converts and multiplies them in
one go, and nothing is summed across its lanes.
"""

from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, no_type_check

import numba
import numpy
import torch

from dashq.runtime.lanes_layout import CHUNK, LANES

Program = Callable[..., None]
PLAIN, FLOAT16, BFLOAT16 = 0, 1, 2  # forms of numbers: a type of numpy's, or the bits of a type that numpy may lack

_one_at_a_time = Lock()  # numba's threads may not be started from two threads at once


def run(program: Program, *arrays: Any) -> None:
    """Run a compiled program on as many threads as torch has."""
    with _one_at_a_time:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        program(*arrays)


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
def _in_place(line, bits, column, lane):
    """A row's code times 2 to the place of its lowest bit in the byte where that lies.

    `line` has a chunk's bytes, [bits, lanes]; which of its columns is meant has to be known when this is compiled.
    """
    # In 32 bits, as the numbers are: numba computes in 64 otherwise, of which a vector has half as many.
    i32, byte, place = numpy.int32, column * bits // 8, column * bits % 8
    code = i32(line[byte, lane])
    if place + bits > 8:
        code = i32(code | i32(i32(line[byte + 1, lane]) << i32(8)))
    return numpy.float32(i32(code & i32((2**bits - 1) << place)))


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


@no_type_check
@numba.njit(inline="always")
def _add_chunk(line, bits, x, part):
    """Add the products of a chunk's codes with its inputs.

    Codes stay where they lie in their bytes, and each input is divided by what that makes of them, a power of two:
    nothing is rounded by it, and no code is shifted. The sum is one of two halves, neither waiting for the other.
    """
    f32 = numpy.float32
    x0, x1 = x[0], x[1] * f32(2.0 ** -(bits % 8))
    x2, x3 = x[2] * f32(2.0 ** -(2 * bits % 8)), x[3] * f32(2.0 ** -(3 * bits % 8))
    x4, x5 = x[4] * f32(2.0 ** -(4 * bits % 8)), x[5] * f32(2.0 ** -(5 * bits % 8))
    x6, x7 = x[6] * f32(2.0 ** -(6 * bits % 8)), x[7] * f32(2.0 ** -(7 * bits % 8))
    for lane in range(len(part)):
        # Written out, so that a chunk is one step of the loop over lanes.
        part[lane] += (
            _in_place(line, bits, 0, lane) * x0
            + _in_place(line, bits, 1, lane) * x1
            + _in_place(line, bits, 2, lane) * x2
            + _in_place(line, bits, 3, lane) * x3
        ) + (
            _in_place(line, bits, 4, lane) * x4
            + _in_place(line, bits, 5, lane) * x5
            + _in_place(line, bits, 6, lane) * x6
            + _in_place(line, bits, 7, lane) * x7
        )


@cache
def product(bits: int, scale_form: int, offset_form: int, zero: bool) -> Program:
    """y = Σ over groups of s (Σ q x) + o (Σ x), for codes of so many bits.

    It takes `x` [tokens, groups, size], `codes` [tiles, groups, chunks, bits, lanes], `scale` and `offset` [groups,
    rows], and `out` [tokens, rows], which it fills; numbers in float32, scales and offsets as `_wide` and `_offset`
    read them.
    """
    # Names of its own, of which numba's key on disk has the values.
    width, lanes, columns = bits, LANES, CHUNK

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
                        line, own = codes[tile, group, chunk], x[token, group, chunk * columns : (chunk + 1) * columns]
                        inputs += (own[0] + own[1] + own[2] + own[3]) + (own[4] + own[5] + own[6] + own[7])
                        _add_chunk(line, width, own, part)
                    scales, offsets = scale[group, begin:end], offset[group, begin:end]
                    for lane in range(lanes):
                        unit = _wide(scales[lane], scale_form)
                        shift = _offset(offsets[lane], offset_form, zero, unit)
                        total[lane] += part[lane] * unit + inputs * shift
                out[token, begin:end] = total

    program: Program = multiply
    return program


@no_type_check
@numba.njit(inline="always")
def _number(line, bits, column, lane):
    """A row's code, for a column that is known only when this runs."""
    i32, byte, place = numpy.int32, column * bits // 8, column * bits % 8
    code = i32(line[byte, lane])
    if 8 % bits:  # a code may go on in the next byte; the last one has no next, and none goes on there
        code = i32(code | i32(i32(line[min(byte + 1, bits - 1), lane]) << i32(8)))
    return numpy.float32(i32(code >> i32(place)) & i32(2**bits - 1))


@cache
def unpacking(bits: int, scale_form: int, offset_form: int, zero: bool, narrow: bool) -> Program:
    """W = s q + o, for codes of so many bits.

    It takes `codes`, `scale` and `offset` as `product` does, and fills `out` [groups, chunks, 8, rows], which is of
    float32, or of the bits of bfloat16 if `narrow`.
    """
    width, lanes, columns = bits, LANES, CHUNK  # as in `product`

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
                            own = _wide(scales[lane], scale_form)
                            shift = _offset(offsets[lane], offset_form, zero, own)
                            weight = _number(line, width, column, lane) * own + shift
                            if narrow:
                                weights[lane] = _narrow(weight)
                            else:
                                weights[lane] = weight

    program: Program = unpack
    return program
