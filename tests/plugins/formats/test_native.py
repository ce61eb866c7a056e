"""The native format holds 1 to 8 bits in any groups and any order of columns, and leaves the rest to dashq."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import LlamaConfig

from dashq import Grid, Grouping, Layer, PlanError, StoredLayer
from dashq.solving.arithmetic import round_to_nearest
from dashq.testing.comparison import same
from dashq_plugins.formats.native import NativeSerializer
from dashq_plugins.formats.packing import packed_width
from tensors import groupings, noise

NATIVE = NativeSerializer()


@given(groupings(), st.integers(1, 8), st.sampled_from(["float16", "bfloat16"]), st.integers(0, 999))
def test_any_layer_comes_back(grouping: Grouping, bits: int, dtype: str, seed: int) -> None:
    serializer = NativeSerializer.model_validate({"dtype": dtype})
    grid = serializer.grid(bits)
    quantized = round_to_nearest(grouping.split(noise(seed, 3, grouping.columns)), grid, grouping)
    unpacked = serializer.unpack(serializer.pack(quantized), grouping.columns, grouping.size, grid)
    assert same(unpacked, quantized)


@given(groupings(), st.integers(1, 8))
def test_the_tensors_have_the_names_shapes_and_types_of_the_format(grouping: Grouping, bits: int) -> None:
    quantized = round_to_nearest(grouping.split(noise(0, 3, grouping.columns)), NATIVE.grid(bits), grouping)
    tensors = NATIVE.pack(quantized)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    order = {} if grouping.order is None else {"order": ((grouping.columns,), torch.int32)}
    assert (
        shapes
        == {
            "codes": ((3, packed_width(grouping.columns, bits)), torch.uint8),
            "scale": ((3, grouping.groups), torch.float16),
            "offset": ((3, grouping.groups), torch.float16),
        }
        | order
    )


def test_a_layer_by_hand() -> None:
    tensors = {
        "codes": torch.tensor([[0b11100100, 0]], dtype=torch.uint8),  # codes 0, 1, 2 and 3, in the order of the groups
        "scale": torch.tensor([[1.0, 2.0]], dtype=torch.float16),
        "offset": torch.tensor([[0.0, 10.0]], dtype=torch.float16),
        "order": torch.tensor([3, 2, 1, 0], dtype=torch.int32),
    }
    quantized = NATIVE.unpack(tensors, columns=4, size=2, grid=NATIVE.grid(2))
    assert quantized.dequantize().tolist() == [[16.0, 14.0, 1.0, 0.0]]


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(PlanError, match=f"^the dashq format holds 1 to 8 bits, not {bits}$"):
        NATIVE.grid(bits)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_and_real_zeros_are_of_the_type_that_the_recipe_says(dtype: str) -> None:
    grid = NativeSerializer.model_validate({"dtype": dtype}).grid(3)
    assert grid == Grid(bits=3, dtype=getattr(torch, dtype), zero="real")


def test_scales_of_a_type_that_nobody_asked_for_are_refused() -> None:
    with pytest.raises(ValidationError, match="'float16' or 'bfloat16'"):
        NativeSerializer.model_validate({"dtype": "float32"})


def test_layers_differ_as_they_like_and_dashq_writes_the_settings() -> None:
    layers = [
        StoredLayer(layer=Layer(name=f"l{bits}", rows=2, columns=8), grid=NATIVE.grid(bits), size=bits, ordered=True)
        for bits in (2, 4)
    ]
    NATIVE.check(layers)
    assert NATIVE.describe(layers, [], LlamaConfig()) is None
    assert NATIVE.holds_experts
