"""A packed layer computes the product with its dequantized weight, and keeps its stored numbers."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dashq import (
    DashqLinear,
    Grouping,
    Layer,
    Quantized,
    StoredLayer,
)
from dashq.solving.arithmetic import round_to_nearest
from recipes import REGISTRY
from tensors import groupings, noise

SERIALIZER = REGISTRY.serializers["dashq"]()


def packed_layer(grouping: Grouping, bits: int, bias: bool) -> tuple[DashqLinear, Quantized]:
    """A layer of 6 rows, and what it was packed from."""
    grid = SERIALIZER.grid(bits)
    quantized = round_to_nearest(grouping.split(noise(bits, 6, grouping.columns)), grid, grouping)
    layer = DashqLinear(
        SERIALIZER,
        StoredLayer(
            layer=Layer(name="layer", rows=6, columns=grouping.columns),
            grid=grid,
            size=grouping.size,
            ordered=grouping.order is not None,
        ),
        bias,
    )
    state = dict(SERIALIZER.pack(quantized)) | ({"bias": noise(1, 6)} if bias else {})
    layer.load_state_dict(state)
    return layer, quantized


@given(grouping=groupings(), bits=st.integers(1, 8), bias=st.booleans(), leading=st.sampled_from([(1,), (4,), (2, 3)]))
def test_the_product_is_that_of_the_dequantized_weight(
    grouping: Grouping, bits: int, bias: bool, leading: tuple[int, ...]
) -> None:
    layer, quantized = packed_layer(grouping, bits, bias)
    x = noise(7, *leading, grouping.columns)
    assert torch.equal(layer.weight, quantized.dequantize())
    assert torch.equal(layer(x), functional.linear(x, quantized.dequantize(), layer.bias))
    assert torch.equal(quantized.dequantize(torch.bfloat16), quantized.dequantize().bfloat16())
    plain = layer.dequantized(torch.float32)
    assert torch.equal(plain(x), layer(x))


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float])
def test_another_type_of_computation_keeps_the_stored_numbers(cast: Callable[[nn.Module], nn.Module]) -> None:
    layer, quantized = packed_layer(Grouping(columns=24, size=8, order=torch.randperm(24)), bits=3, bias=True)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    cast(layer)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name
    assert layer.bias is not None
    x = noise(2, 5, 24).to(layer.bias.dtype)
    expected = functional.linear(x, quantized.dequantize().to(x.dtype), layer.bias)
    assert layer(x).dtype == layer.bias.dtype
    assert torch.equal(layer(x), expected)


def test_a_packed_layer_says_what_it_is() -> None:
    layer, _ = packed_layer(Grouping(columns=24, size=8), bits=3, bias=False)
    assert str(layer) == "DashqLinear(24, 6, bits=3, group_size=8)"
    assert (layer.in_features, layer.out_features) == (24, 6)
    assert not list(layer.parameters())
