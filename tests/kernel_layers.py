"""Packed layers to try kernels on, and the products that they should have."""

import torch
from torch import Tensor

from dashq import DashqLinear, Grouping, Layer, StoredLayer
from dashq.solving.arithmetic import round_to_nearest
from recipes import REGISTRY
from tensors import noise


def stored_layer(rows: int, grouping: Grouping, bits: int, format_name: str = "dashq") -> DashqLinear:
    """A packed layer of random weights with a bias."""
    serializer = REGISTRY.serializers[format_name]()
    grid = serializer.grid(bits)
    quantized = round_to_nearest(grouping.split(noise(bits, rows, grouping.columns)), grid, grouping)
    ordered = grouping.order is not None
    layer = Layer(name="layer", rows=rows, columns=grouping.columns)
    linear = DashqLinear(
        serializer, StoredLayer(layer=layer, grid=grid, size=grouping.size, ordered=ordered), bias=True
    )
    linear.load_state_dict(dict(serializer.pack(quantized)) | {"bias": noise(1, rows)})
    return linear


def product(layer: DashqLinear, x: Tensor) -> Tensor:
    """The layer's product in float64."""
    assert layer.bias is not None
    return torch.nn.functional.linear(x.double(), layer.quantized().dequantize().double(), layer.bias.double())


def relative_error(y: Tensor, expected: Tensor) -> float:
    """The norm of the difference by that of what is expected."""
    return float((y.double() - expected).norm() / expected.norm())
