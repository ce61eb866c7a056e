"""Codes of any bits lie in whole bytes, and take no more of them than they have bits."""

import pytest
import torch

from dashq.runtime.lanes_layout import CHUNK, LANES, from_bytes, to_bytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_chunk_has_as_many_bytes_as_codes_have_bits_and_no_two_chunks_are_alike(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (1, 1, 3, CHUNK, LANES), generator=generator, dtype=torch.uint8)
    packed = to_bytes(codes, bits)
    assert packed.shape == (1, 1, 3, bits, LANES)
    assert from_bytes(packed, bits).equal(codes)
    changed = codes.clone()
    changed[0, 0, 1, 5, 7] ^= 1
    places = (to_bytes(changed, bits) != packed).nonzero()
    assert len(places) == 1
    assert places[0].tolist()[2::2] == [1, 7]


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_lie_one_after_the_other_from_the_lowest_bits_up(bits: int) -> None:
    codes = torch.randint(2**bits, (CHUNK,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = to_bytes(codes.view(1, 1, 1, CHUNK, 1), bits).flatten().tolist()
    run = sum(code << bits * column for column, code in enumerate(codes.tolist()))
    assert int.from_bytes(bytes(packed), "little") == run
