"""The programs of lanes read codes of any bits where they were put, and numba finds them on disk again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")

from dashq.runtime.lanes_layout import CHUNK, LANES, to_bytes
from dashq.runtime.lanes_programs import BFLOAT16, FLOAT16, PLAIN, Program, unpacking


@pytest.mark.parametrize("bits", range(1, 9))
def test_unpacking_finds_every_code_of_every_place(bits: int) -> None:
    check_unpacking(unpacking(bits, PLAIN, PLAIN, False, False), bits)


def check_unpacking(program: Program, bits: int) -> None:
    """A program finds random codes again."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (2, 3, 4, CHUNK, LANES), generator=generator, dtype=torch.uint8)
    packed = to_bytes(codes, bits)
    assert packed.shape == (2, 3, 4, bits, LANES)
    out, ones = torch.empty(3, 4, CHUNK, 2 * LANES), torch.ones(3, 2 * LANES)
    program(packed.numpy(), ones.numpy(), (0 * ones).numpy(), out.numpy())
    assert out.view(3, 4, CHUNK, 2, LANES).permute(3, 0, 1, 2, 4).equal(codes.float())


@pytest.mark.parametrize(("dtype", "form"), [(torch.float16, FLOAT16), (torch.bfloat16, BFLOAT16)])
@pytest.mark.parametrize("name", ["scale", "offset", "zero"])
def test_every_finite_number_of_16_bits_is_read_as_it_is(name: str, dtype: torch.dtype, form: int) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    halves = torch.where(halves.isfinite(), halves, 0).view(1, -1)
    ones = torch.ones_like(halves)
    scale, offset = {"scale": (halves, 0 * ones), "offset": (ones, halves), "zero": (ones, halves)}[name]
    # Codes are 1; where offsets are zeros, 0.
    codes = torch.full((2**16 // LANES, 1, 1, CHUNK, LANES), int(name == "scale"), dtype=torch.uint8)
    out = torch.empty(1, 1, CHUNK, 2**16)
    numbers = [number.view(torch.uint16).numpy() for number in (scale, offset)]
    unpacking(1, form, form, name == "zero", False)(to_bytes(codes, 1).numpy(), *numbers, out.numpy())
    expected = -halves.float() if name == "zero" else halves.float()
    assert out.equal(expected.expand(1, 1, CHUNK, -1))


def test_zeros_count_as_codes_do() -> None:
    codes = torch.arange(CHUNK, dtype=torch.uint8)[:, None].expand(1, 1, 1, CHUNK, LANES).contiguous()
    scale, zero, out = (
        torch.full((1, LANES), 0.5),
        torch.full((1, LANES), 3, dtype=torch.uint8),
        torch.empty(1, 1, CHUNK, LANES),
    )
    unpacking(3, PLAIN, PLAIN, True, False)(to_bytes(codes, 3).numpy(), scale.numpy(), zero.numpy(), out.numpy())
    assert out[0, 0, :, 0].tolist() == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2]


def test_weights_are_rounded_to_bfloat16_as_torch_rounds_them() -> None:
    generator = torch.Generator().manual_seed(0)
    ties = torch.arange(0x3F80_0000, 0x3F80_0000 + LANES * 2**14, 2**14, dtype=torch.int32).view(torch.float32)
    scale = torch.cat([ties, torch.randn(2**12, generator=generator)]).view(1, -1)
    packed = to_bytes(torch.ones(scale.numel() // LANES, 1, 1, CHUNK, LANES, dtype=torch.uint8), 1)
    out = torch.empty(1, 1, CHUNK, scale.numel(), dtype=torch.bfloat16)
    arrays = [packed.numpy(), scale.numpy(), (0 * scale).numpy(), out.view(torch.uint16).numpy()]
    unpacking(1, PLAIN, PLAIN, False, True)(*arrays)
    assert out.equal(scale.bfloat16().expand(1, 1, CHUNK, -1))


def test_a_program_is_compiled_once_for_all_processes() -> None:
    program = (
        "import numpy\nfrom dashq.runtime.lanes_programs import unpacking\np = unpacking(2, 0, 0, False, False)\n"
        "z = numpy.zeros\nf = numpy.float32\n"
        "p(z((1, 1, 1, 2, 64), numpy.uint8), z((1, 64), f), z((1, 64), f), z((1, 1, 8, 64), f))\n"
        "print(len(p.stats.cache_hits))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    again = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert again.stdout == "1\n"


def test_where_nothing_can_be_written_programs_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.CACHE_LOCATOR_CLASSES", "ZipCacheLocator")  # which this module is not in
    check_unpacking(unpacking.__wrapped__(1, PLAIN, PLAIN, False, False), 1)


def test_programs_on_disk_are_of_one_layout(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom dashq.runtime import lanes_layout\nlanes_layout.LANES = int(sys.argv[1])\n"
        "from dashq.runtime.lanes_programs import unpacking\np = unpacking(1, 0, 0, False, False)\n"
        "p.compile('void(u1[:, :, :, :, ::1], f4[:, ::1], f4[:, ::1], f4[:, :, :, ::1])')\n"
        "print(len(p.stats.cache_hits))"
    )
    hits = [
        subprocess.run(
            [sys.executable, "-c", program, lanes],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        ).stdout
        for lanes in ("64", "32", "64")
    ]
    assert hits == ["0\n", "0\n", "1\n"]
