"""The blocks of GGUF's types are those that llama.cpp reads, byte by byte, and come back as they were."""

import gguf
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashq import Grid, Layer, Quantized, StoredLayer
from dashq.testing.examples import quantized_layers
from dashq_plugins.formats.gguf.blocks import TYPES, BlockType, named, type_of

CODEBOOKS = ("IQ2_S", "IQ3_S", "IQ4_XS", "IQ4_NL")
every_type = pytest.mark.parametrize(
    "kind", [*TYPES.values(), *(named(name) for name in CODEBOOKS)], ids=lambda kind: kind.name
)


def layers(kind: BlockType) -> st.SearchStrategy[Quantized]:
    """Layers that this type can hold."""
    fitting = quantized_layers(kind.grid)
    return fitting.filter(
        lambda q: q.grouping.order is None and q.grouping.size == kind.size and q.grouping.columns % kind.columns == 0
    )


@every_type
def test_a_block_has_as_many_weights_and_bytes_as_in_llama_cpp(kind: BlockType) -> None:
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    assert (kind.columns, kind.bytes) == sizes
    assert kind.groups * kind.size == kind.columns


@every_type
@given(data=st.data())
@settings(max_examples=8)
def test_the_gguf_package_reads_the_same_weights_bit_by_bit(kind: BlockType, data: st.DataObject) -> None:
    q = data.draw(layers(kind))
    packed = kind.to_bytes(q)
    assert packed.shape == (len(q.codes), q.grouping.columns // kind.columns * kind.bytes)
    read = gguf.quants.dequantize(packed.numpy(), kind.kind)
    numpy.testing.assert_array_equal(read, q.dequantize().numpy())


@every_type
@given(data=st.data())
@settings(max_examples=8)
def test_what_is_packed_comes_back(kind: BlockType, data: st.DataObject) -> None:
    q = data.draw(layers(kind))
    codes, scale, offset = kind.from_bytes(kind.to_bytes(q))
    assert codes.equal(q.codes)
    assert scale.equal(q.scale)
    assert offset.equal(q.offset)


@every_type
def test_without_values_a_layer_has_the_same_shape(kind: BlockType) -> None:
    layer = Layer(name="l", rows=3, columns=2 * kind.columns)
    q = StoredLayer(layer=layer, grid=kind.grid, size=kind.size, ordered=False).empty()
    empty = kind.to_bytes(q)
    assert (empty.shape, empty.dtype, empty.is_meta) == ((3, 2 * kind.bytes), torch.uint8, True)


@every_type
def test_a_grid_belongs_to_one_type(kind: BlockType) -> None:
    assert type_of(kind.grid) is kind
    assert named(kind.name) is kind
    assert kind.name.removeprefix("I").startswith(f"Q{kind.grid.bits}")


@pytest.mark.parametrize(("name", "size"), [("IQ2_S", 8), ("IQ3_S", 4)])
def test_a_codebook_has_the_patterns_of_the_gguf_package_in_their_order(name: str, size: int) -> None:
    reference = getattr(gguf.quants, name)
    reference.init_grid()
    codebook = named(name).grid.codebook
    assert codebook
    unit = 8 if name == "IQ2_S" else 1
    expected = torch.from_numpy(reference.grid).reshape(-1, size) / unit
    assert codebook.entries(torch.device("cpu")).equal(expected)
    assert codebook.levels == tuple(sorted(codebook.levels))


def test_a_grid_of_no_type_is_an_error() -> None:
    with pytest.raises(KeyError):
        type_of(Grid(bits=3, dtype=torch.float16))
