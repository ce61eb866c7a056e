"""The kernels of auto-round-kernel multiply as unpacked weights do on every grid, and give all bytes back."""

import pytest
import torch

from dashq import Grouping
from dashq.runtime.kernel_choice import KernelRequest
from kernel_layers import product, relative_error, stored_layer
from tensors import noise

pytest.importorskip("auto_round_kernel")

ORDER = torch.randperm(100, generator=torch.Generator().manual_seed(0))
SHAPES = [
    (1, Grouping(columns=64, size=64)),
    (33, Grouping(columns=100, size=32)),
    (48, Grouping(columns=100, size=24, order=ORDER)),
    (80, Grouping(columns=192, size=192)),
    (100, Grouping(columns=40, size=8)),
]
KERNELS = [
    ("ark_int8", torch.bfloat16, 2e-2),
    ("ark_bfloat16", torch.bfloat16, 1e-2),
    ("ark_float32", torch.float32, 1e-5),
]


@pytest.mark.parametrize(("name", "dtype", "tolerance"), KERNELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "grouping"), SHAPES)
def test_the_product_is_that_of_the_unpacked_weight(
    name: str, dtype: torch.dtype, tolerance: float, bits: int, rows: int, grouping: Grouping
) -> None:
    layer = stored_layer(rows, grouping, bits)
    layer.to(dtype)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.use(KernelRequest(name), dtype)
    assert layer.kernel
    for leading in ((1,), (7,), (2, 20)):
        x = noise(3, *leading, grouping.columns).to(dtype)
        assert layer(x).dtype == dtype
        assert relative_error(layer(x), product(layer, x)) < tolerance
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].equal(tensor) for key, tensor in before.items())


@pytest.mark.parametrize("format_name", ["mlx", "gptq", "compressed-tensors", "dashq-packed-linear"])
def test_every_zero_and_format_has_the_same_product(format_name: str) -> None:
    layer = stored_layer(64, Grouping(columns=128, size=64), 4, format_name)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = noise(3, 5, 128)
    layer.use(KernelRequest("ark_float32"), torch.float32)
    assert layer.kernel
    assert relative_error(layer(x), product(layer, x)) < 1e-5
    assert all(layer.state_dict()[key].equal(tensor) for key, tensor in before.items())


@pytest.mark.parametrize(("name", "dtype", "tolerance"), KERNELS)
def test_nan_comes_through_in_its_own_token_alone(name: str, dtype: torch.dtype, tolerance: float) -> None:
    layer = stored_layer(48, Grouping(columns=64, size=32), 3)
    layer.use(KernelRequest(name), dtype)
    x = noise(1, 3, 64).to(dtype)
    x[1, 5] = torch.nan
    nan = layer(x).isnan()
    assert nan[1].all()
    assert not nan[[0, 2]].any()


def test_sizes_that_were_not_tried_are_not_claimed() -> None:
    layer = stored_layer(8, Grouping(columns=36, size=12), 3)
    layer.use(KernelRequest("ark_float32"), torch.float32)
    assert layer.kernel is None
