"""torch's kernel of 4 bits multiplies as unpacked weights do, and gives back all bytes."""

import pytest
import torch

from dashq import Grouping
from kernel_layers import ROUNDING, check_product, grouped, parts, stored_layer
from tensors import noise

ORDER = torch.randperm(100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("rows", "grouping"),
    [
        (16, Grouping(columns=64, size=32)),
        (80, Grouping(columns=100, size=32, order=ORDER)),
        (64, Grouping(columns=256, size=128)),
    ],
)
def test_the_product_is_that_of_the_unpacked_weight(bits: int, rows: int, grouping: Grouping) -> None:
    layer = stored_layer(rows, grouping, bits).bfloat16()
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.use("int4", torch.bfloat16)
    assert layer.kernel
    symmetric, shift = parts(layer)
    # The kernel's scale, zero and weight are each rounded to bfloat16.
    moved = 2 * ROUNDING[torch.bfloat16] * (symmetric.abs() + shift.abs()[..., None])
    for leading in ((1,), (7,), (2, 20)):
        x = noise(3, *leading, grouping.columns).bfloat16()
        check_product(layer, x, torch.einsum("tgs,rgs->tr", grouped(layer, x).abs(), moved))
    assert all(layer.state_dict()[key].equal(tensor) for key, tensor in before.items())
    x[0, 0, 5] = torch.nan
    assert layer(x)[0, 0].isnan().all()
    assert not layer(x)[1].isnan().any()


def test_other_rows_sizes_and_types_are_not_claimed() -> None:
    for rows, size, bits, dtype in (
        (8, 32, 4, torch.bfloat16),
        (16, 16, 4, torch.bfloat16),
        (16, 32, 4, torch.float32),
    ):
        layer = stored_layer(rows, Grouping(columns=64, size=size), bits)
        layer.use("int4", dtype)
        assert layer.kernel is None
