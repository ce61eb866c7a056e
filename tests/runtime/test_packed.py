"""A packed matrix holds the serializer's tensors, in their own types whatever the model is cast to."""

import torch

from dashq import Grouping, Layer, StoredLayer
from dashq.runtime.packed import PackedMatrix
from dashq.solving.arithmetic import round_to_nearest
from dashq_plugins.formats.native import NativeSerializer


def test_it_gives_back_what_was_packed_and_keeps_types() -> None:
    serializer = NativeSerializer()
    grouping, grid = Grouping(columns=32, size=16), serializer.grid(4)
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    quantized = round_to_nearest(grouping.split(weight), grid, grouping)
    layer = Layer(name="table", rows=6, columns=32)
    matrix = PackedMatrix(serializer, StoredLayer(layer=layer, grid=grid, size=16, ordered=False))
    matrix.load_state_dict(serializer.pack(quantized))
    matrix.to(torch.float64)
    assert {name: tensor.dtype for name, tensor in matrix.packed().items()} == {
        "codes": torch.uint8,
        "scale": torch.float16,
        "offset": torch.float16,
    }
    assert matrix.weight.equal(quantized.dequantize())
    assert matrix.device == torch.device("cpu")
    assert str(matrix) == "PackedMatrix(32, 6, bits=4, group_size=16)"
