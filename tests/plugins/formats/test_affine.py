"""An affine layer is words of codes with a scale and an offset for each group, and comes back as it was."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq import Grid, Grouping
from dashq.solving.arithmetic import round_to_nearest
from dashq.testing.comparison import same
from dashq_plugins.formats.affine import pack_affine, unpack_affine
from dashq_plugins.formats.words import pack_words
from tensors import noise

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])


@given(st.integers(1, 8), DTYPES, st.sampled_from([(32, 8), (96, 32), (40, 40), (30, 10)]), st.integers(0, 999))
def test_what_is_packed_comes_back(bits: int, dtype: torch.dtype, shape: tuple[int, int], seed: int) -> None:
    columns, size = shape
    grid, grouping = Grid(bits=bits, dtype=dtype), Grouping(columns=columns, size=size)
    quantized = round_to_nearest(grouping.split(noise(seed, 3, columns)), grid, grouping)
    assert same(unpack_affine(pack_affine(quantized, "biases"), "biases", columns, size, grid), quantized)


def test_the_tensors_have_the_names_types_and_numbers_of_the_format() -> None:
    grid, grouping = Grid(bits=4, dtype=torch.bfloat16), Grouping(columns=16, size=8)
    quantized = round_to_nearest(grouping.split(noise(0, 2, 16)), grid, grouping)
    tensors = pack_affine(quantized, "qbiases")
    assert list(tensors) == ["weight", "scales", "qbiases"]
    assert tensors["weight"].dtype == torch.uint32
    assert tensors["weight"].view(torch.int32).equal(pack_words(quantized.codes.flatten(1), 4))
    assert tensors["scales"].equal(quantized.scale)
    assert tensors["qbiases"].equal(quantized.offset)


def test_a_weight_by_hand() -> None:
    grid = Grid(bits=4, dtype=torch.float32)
    tensors = {
        "weight": torch.tensor([[0x76543210]], dtype=torch.int32).view(torch.uint32),  # codes 0 to 7
        "scales": torch.tensor([[0.5, 2.0]]),
        "biases": torch.tensor([[-1.0, 10.0]]),
    }
    weight = unpack_affine(tensors, "biases", columns=8, size=4, grid=grid).dequantize()
    assert weight.tolist() == [[-1.0, -0.5, 0.0, 0.5, 18.0, 20.0, 22.0, 24.0]]
