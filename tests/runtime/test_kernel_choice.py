"""The kernel of each layer is chosen by name, safely by itself, and never where its package is missing."""

import logging

import pytest
import torch
from torch import nn

from dashq import Grouping, MissingPackageError, UsageError, kernels_in_use, use_kernels
from dashq.runtime import kernel_choice
from dashq.runtime.kernel_choice import KernelRequest, exactly
from kernel_layers import stored_layer
from tensors import noise

WIDE = Grouping(columns=512, size=64)


def test_unknown_kernels_are_refused_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match=r"no kernels 'exat'. Did you mean 'exact'\? Possible: auto, exact, ark_int8"):
        use_kernels(nn.Linear(2, 2), "exat")


def test_without_the_package_layers_are_unpacked_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_choice, "is_installed", lambda package: package is None)
    network = nn.Sequential(stored_layer(512, WIDE, 2), stored_layer(512, WIDE, 2))
    with caplog.at_level(logging.WARNING):
        use_kernels(network)
    assert kernels_in_use(network) == {"exact": 2}
    assert [record.message for record in caplog.records] == [
        "packed layers would be faster with auto_round_kernel: pip install 'dashq[kernels]'"
    ]
    with pytest.raises(MissingPackageError, match=r"ark_int8 needs auto_round_kernel.*dashq\[kernels\]"):
        use_kernels(network, "ark_int8")


def test_layers_that_a_named_kernel_cannot_take_are_unpacked() -> None:
    network = nn.Sequential(
        stored_layer(16, Grouping(columns=16, size=8), 4), stored_layer(16, Grouping(columns=16, size=32), 4)
    )
    use_kernels(network, "int4", torch.bfloat16)
    assert kernels_in_use(network) == {"exact": 1, "int4": 1}


def test_auto_rounds_no_inputs_to_8_bits_and_leaves_small_layers() -> None:
    pytest.importorskip("auto_round_kernel")
    network = nn.Sequential(stored_layer(512, WIDE, 2), stored_layer(16, WIDE, 2))
    use_kernels(network, dtype=torch.bfloat16)
    assert kernels_in_use(network) == {"ark_bfloat16": 1, "exact": 1}
    network.float()
    assert kernels_in_use(network) == {"ark_float32": 1, "exact": 1}
    network.double()
    assert kernels_in_use(network) == {"exact": 2}


def test_a_comparison_leaves_kernels_aside() -> None:
    layer = stored_layer(64, Grouping(columns=64, size=32), 4)
    x = noise(2, 3, 64).bfloat16()
    layer.bfloat16()
    layer.use(KernelRequest("exact"), torch.bfloat16)
    expected = layer(x)
    layer.use(KernelRequest("int4"), torch.bfloat16)
    with exactly(layer):
        assert layer(x).equal(expected)
    assert not layer(x).equal(expected)
