"""The programs of lanes read codes of any bits where they were put, and numba finds them on disk again."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("numba")

from dashq.runtime.lanes_layout import CHUNK, LANES, in_planes
from dashq.runtime.lanes_programs import unpacking


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_finds_every_code_of_every_place(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (2, 3, 4, CHUNK, LANES), generator=generator, dtype=torch.uint8)
    packed = in_planes(codes, bits)
    assert packed.shape == (2, 3, 4, bits, LANES)
    out, ones = torch.empty(3, 4, CHUNK, 2 * LANES), torch.ones(3, 2 * LANES)
    unpacking(bits)(packed.numpy(), ones.numpy(), (0 * ones).numpy(), out.numpy())
    assert out.view(3, 4, CHUNK, 2, LANES).permute(3, 0, 1, 2, 4).equal(codes.float())


def test_a_program_is_compiled_once_for_all_processes() -> None:
    program = (
        "import numpy\nfrom dashq.runtime.lanes_programs import unpacking\np = unpacking(2)\n"
        "z = numpy.zeros\nf = numpy.float32\n"
        "p(z((1, 1, 1, 2, 64), numpy.uint8), z((1, 64), f), z((1, 64), f), z((1, 1, 8, 64), f))\n"
        "print(len(p.stats.cache_hits))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    again = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert again.stdout == "1\n"
