"""Codes of b bits lie in a row of bytes one after the other, lowest bit first, and come back as they were."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq_plugins.formats.packing import pack_bits, packed_width, unpack_bits

ALL_BITS = st.integers(1, 8)


@given(ALL_BITS, st.integers(1, 4), st.integers(1, 100), st.integers(0, 999))
def test_what_is_packed_comes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, packed_width(columns, bits))
    assert unpack_bits(packed, bits, columns).equal(codes)


@given(ALL_BITS, st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_code_j_has_bits_j_times_b_and_up(bits: int, numbers: list[int]) -> None:
    codes = [number % 2**bits for number in numbers]
    stream = sum(code << (bits * j) for j, code in enumerate(codes))
    expected = stream.to_bytes(packed_width(len(codes), bits), "little")
    assert bytes(pack_bits(torch.tensor([codes], dtype=torch.uint8), bits)[0].tolist()) == expected


def test_three_bits_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8)
    # 000 111 110 101 100 011 010 001, read from the last code to the first, in bytes: 00011111 01011000 11010001
    assert pack_bits(codes, 3).tolist() == [[0b11010001, 0b01011000, 0b00011111]]


@pytest.mark.parametrize(("columns", "bits", "width"), [(8, 3, 3), (9, 3, 6), (64, 2, 16), (1, 1, 1), (10, 8, 16)])
def test_rows_are_filled_up_to_eight_codes(columns: int, bits: int, width: int) -> None:
    assert packed_width(columns, bits) == width
    assert pack_bits(torch.zeros(1, columns, dtype=torch.uint8), bits).shape == (1, width)
