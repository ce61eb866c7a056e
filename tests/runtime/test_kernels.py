"""The identity by which symmetric kernels serve every zero."""

import pytest
import torch

from dashq import Grouping
from kernel_layers import stored_layer
from tensors import noise


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("grouping", [Grouping(columns=40, size=8), Grouping(columns=30, size=7)])
def test_group_sums_bring_any_zero_into_a_symmetric_product(bits: int, grouping: Grouping) -> None:
    quantized = stored_layer(5, grouping, bits).quantized()
    scale, offset, middle = quantized.scale.double(), quantized.offset.double(), quantized.grid.middle
    x = noise(4, 3, grouping.columns).double()
    groups = grouping.split_importance(x)
    symmetric = torch.einsum("tgs,rgs,rg->tr", groups, quantized.codes.double() - middle, scale)
    weight = grouping.join(scale[..., None] * quantized.codes + offset[..., None])
    torch.testing.assert_close(symmetric + groups.sum(-1) @ (offset + middle * scale).T, x @ weight.T)
