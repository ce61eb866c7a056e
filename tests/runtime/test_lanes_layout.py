"""Codes of any bits lie in whole bytes, and take no more of them than they have bits."""

import pytest
import torch

from dashq.runtime.lanes_layout import CHUNK, LANES, from_planes, in_planes, planes


@pytest.mark.parametrize("bits", range(1, 9))
def test_planes_hold_all_bits_and_divide_bytes(bits: int) -> None:
    assert sum(planes(bits)) == bits
    assert all(8 % width == 0 for width in planes(bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_chunk_has_as_many_bytes_as_codes_have_bits_and_no_two_chunks_are_alike(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (1, 1, 3, CHUNK, LANES), generator=generator, dtype=torch.uint8)
    packed = in_planes(codes, bits)
    assert packed.shape == (1, 1, 3, bits, LANES)
    assert from_planes(packed, bits).equal(codes)
    changed = codes.clone()
    changed[0, 0, 1, 5, 7] ^= 1
    places = (in_planes(changed, bits) != packed).nonzero()
    assert len(places) == 1
    assert places[0].tolist()[2::2] == [1, 7]
