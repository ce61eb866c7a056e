"""The blocks of GGUF's types."""

import gguf
import pytest

from dashq_plugins.formats.gguf.blocks import TYPES


@pytest.mark.parametrize("name", TYPES)
def test_a_block_has_as_many_weights_and_bytes_as_in_llama_cpp(name: str) -> None:
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert (TYPES[name].columns, TYPES[name].bytes) == sizes
