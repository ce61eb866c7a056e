"""Packed layers to try kernels on, and the products that they should have."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from dashq import DashqLinear, Grid, Grouping, Layer, StoredLayer
from dashq.solving.arithmetic import round_to_nearest
from recipes import REGISTRY
from tensors import noise

GRID = Grid(bits=2, dtype=torch.float16)  # to ask kernels that work for all grids or none
# Half a unit in the last place, relative to a number.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


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


def parts(layer: DashqLinear) -> tuple[Float[Tensor, "rows groups size"], Float[Tensor, "rows groups"]]:
    """The weight in float64 as s (q - c) for each column and o + s c for each group."""
    quantized = layer.quantized()
    scale, middle = quantized.scale.double(), quantized.grid.middle
    return (quantized.codes.double() - middle) * scale[..., None], quantized.offset.double() + middle * scale


def grouped(layer: DashqLinear, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "tokens groups size"]:
    """Inputs in float64 in the groups of the layer's columns."""
    return layer.quantized().grouping.split_importance(x.double().flatten(0, -2))


def check_product(
    layer: DashqLinear, x: Float[Tensor, "*batch columns"], allowed: Float[Tensor, "tokens rows"]
) -> None:
    """The layer's outputs differ from its product in float64 by what is allowed, and by the roundings of its type.

    These are float32's in each of the product's sums, and the type's own of the product and of its sum with the bias.
    A kernel multiplies any number of tokens then.
    """
    assert layer.bias is not None
    layer.many = math.inf
    symmetric, shift = parts(layer)
    groups = grouped(layer, x)
    product = torch.einsum("tgs,rgs->tr", groups, symmetric) + torch.einsum("tgs,rg->tr", groups, shift)
    sizes = torch.einsum("tgs,rgs->tr", groups.abs(), symmetric.abs())
    sizes = sizes + torch.einsum("tgs,rg->tr", groups.abs(), shift.abs())
    expected = product + layer.bias.double()
    inner = groups[0].numel() * ROUNDING[torch.float32] * sizes
    outer = ROUNDING[x.dtype] * (product.abs() + expected.abs() + allowed + inner)
    outputs = layer(x)
    assert outputs.dtype == x.dtype
    error = (outputs.double().flatten(0, -2) - expected).abs()
    assert (error <= 1.01 * (allowed + inner + outer)).all()
