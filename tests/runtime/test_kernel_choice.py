"""The kernel of a layer is chosen by name or safely by itself, and never where its package is missing."""

import pytest
import torch

from dashq import Grouping, Layer, MissingPackageError, StoredLayer, UsageError
from dashq.runtime.kernel_choice import ARK_INT8X2, AUTO, KERNELS, SAFE, check_kernels, choose_kernel, missing_package
from dashq.testing.examples import CODEBOOK_GRIDS
from kernel_layers import GRID, stored_layer
from kernel_packages import without_packages

CPU = torch.device("cpu")
HALF = (torch.bfloat16, torch.float16)


def chosen(name: str, rows: int, dtype: torch.dtype, bits: int = 2) -> str | None:
    """The name of the kernel for a layer of 1024 columns."""
    kernel = choose_kernel(name, stored_layer(rows, Grouping(columns=1024, size=64), bits).stored, dtype, CPU)
    return kernel.name if kernel else None


def test_unknown_kernels_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        UsageError, match=r"no kernels 'exat'. Did you mean 'exact'\? Possible: auto, exact, lanes, ark_int8"
    ):
        check_kernels("exat")


def test_auto_takes_lanes_for_all_but_small_layers() -> None:
    pytest.importorskip("numba")
    for dtype in (*HALF, torch.float32):
        assert [chosen(AUTO, rows, dtype, bits) for rows, bits in ((1024, 2), (64, 7), (16, 2))] == [
            "lanes",
            "lanes",
            None,
        ]
    assert chosen(AUTO, 1024, torch.float64) is None


def test_without_numba_auto_follows_the_type_and_the_size_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("auto_round_kernel")
    with without_packages(monkeypatch, "numba"):
        check_the_library_s_own()


def check_the_library_s_own() -> None:
    """The arithmetic of auto-round-kernel for each type and size."""
    plain = ["ark_bfloat16", "ark_float32"]  # also of large layers, where the library does not round as is known
    assert [chosen(AUTO, 1024, dtype) for dtype in HALF] == (["ark_int8x2"] * 2 if ARK_INT8X2.works(GRID) else plain)
    assert [chosen(AUTO, 64, dtype) for dtype in HALF] == plain
    assert [chosen(AUTO, rows, torch.float32) for rows in (1024, 64)] == ["ark_float32", "ark_float32"]
    assert [chosen(AUTO, 16, dtype) for dtype in (*HALF, torch.float32)] == [None, None, None]
    assert chosen(AUTO, 1024, torch.float64) is None
    assert "ark_int8" not in {kernel.name for kernels in SAFE.values() for kernel in kernels}


def test_a_named_kernel_is_taken_wherever_it_can_and_exact_never() -> None:
    assert chosen("int4", 16, torch.bfloat16) == "int4"
    assert chosen("int4", 16, torch.float32) is None
    assert chosen("exact", 1024, torch.bfloat16) is None


def test_codes_that_stand_for_levels_have_no_kernel() -> None:
    for grid in CODEBOOK_GRIDS:
        assert grid.super_blocks
        layer = Layer(name="layer", rows=64, columns=1024)
        stored = StoredLayer(layer=layer, grid=grid, size=grid.super_blocks.size, ordered=False)
        for name in (AUTO, *KERNELS):
            assert choose_kernel(name, stored, torch.bfloat16, CPU) is None
            assert missing_package(name, stored, torch.bfloat16, CPU) is None


def test_without_the_package_4_bits_have_the_kernel_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with without_packages(monkeypatch):
        assert chosen(AUTO, 1024, torch.bfloat16, bits=4) == "int4"
        assert chosen(AUTO, 1024, torch.bfloat16, bits=3) is None
        assert chosen(AUTO, 1024, torch.float32, bits=4) is None


def test_the_package_that_is_missed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = stored_layer(1024, Grouping(columns=1024, size=64), 2).stored
    with without_packages(monkeypatch):
        assert missing_package(AUTO, stored, torch.bfloat16, CPU) == "numba"
        assert missing_package("ark_float32", stored, torch.bfloat16, CPU) == "auto_round_kernel"
        assert missing_package("exact", stored, torch.bfloat16, CPU) is None
        assert missing_package(AUTO, stored, torch.float64, CPU) is None
        for name, kernel in KERNELS.items():
            if kernel.package:
                with pytest.raises(MissingPackageError, match=rf"{name} needs {kernel.package}.*dashq\[kernels\]"):
                    check_kernels(name)
