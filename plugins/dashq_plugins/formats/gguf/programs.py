"""GGUF files opened by the package `gguf` and by llama.cpp."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from jaxtyping import Float
from torch import Tensor

from dashq import Opened
from dashq.model.gguf_layout import GgufLayout
from dashq.model.location import Location
from dashq_plugins.formats.gguf.carried import architecture_of, copy_fields
from dashq_plugins.formats.gguf.file import GgufFile
from dashq_plugins.formats.gguf.names import place

TOKENS = 512  # as many as the fixed prompt can have


def open_with_gguf(folder: Path, trust_remote_code: bool) -> Opened:
    """The dequantizers of the package `gguf`, which are llama.cpp's own in Python."""
    import gguf

    tensors, layout = _tensors(Location(folder, trust_remote_code=trust_remote_code))

    def weight(name: str) -> Tensor:
        whole, expert = place(f"{name}.weight")
        parts = [tensors[part] for part in layout.names(whole)]
        values = [torch.from_numpy(gguf.dequantize(part.data, part.tensor_type)) for part in parts]
        result = layout.from_file(whole, values)
        return result if expert is None else result[expert]

    return Opened(weight=weight)


def open_with_llama_cpp(folder: Path, trust_remote_code: bool) -> Opened:
    """llama.cpp through llama-cpp-python, with its kernels for packed weights, which round their inputs to 8 bits."""
    import gguf
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports] - optional

    tensors, layout = _tensors(Location(folder, trust_remote_code=trust_remote_code))
    model: Any = Llama(str(folder / GgufFile.file), n_ctx=TOKENS, logits_all=True, verbose=False)

    def rounded(name: str, x: Float[Tensor, "*tokens columns"]) -> Float[Tensor, "*tokens columns"]:
        kind = tensors[layout.names(place(f"{name}.weight")[0])[0]].tensor_type
        return round_to_8_bits(x, gguf.GGML_QUANT_SIZES[kind][0])  # in blocks as long as those of the weights

    # Plain matrices, such as the head, and the cache of keys and values are multiplied in float16.
    return Opened(logits=_logits(model), rounded=rounded, logits_tolerance=5e-3)


def open_in_float32_with_llama_cpp(folder: Path, trust_remote_code: bool) -> Opened:
    """llama.cpp with the same weights in float32, which it does not round: everything but its kernels is compared."""
    from llama_cpp import GGML_TYPE_F32, Llama  # pyright: ignore[reportMissingImports] - optional

    with TemporaryDirectory() as temporary:
        path = Path(temporary) / GgufFile.file
        rewrite(folder / GgufFile.file, path, in_float32)
        cache: dict[str, Any] = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "flash_attn": False}
        model: Any = Llama(str(path), n_ctx=TOKENS, logits_all=True, use_mmap=False, verbose=False, **cache)
    # Where nothing is rounded 2e-6 was seen; 2.5e-4 where a table in float16 stands for GELU.
    return Opened(logits=_logits(model), logits_tolerance=1e-3)


def rewrite(source: Path, target: Path, numbers: Callable[[Any], Any]) -> None:
    """Copy a GGUF file; `numbers` gives, as a numpy array, the new content of each of the reader's tensors."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture_of(reader), use_temp_file=True)
    copy_fields(reader, writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, numbers(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_float32(tensor: Any) -> Any:
    """The numbers of a tensor of any type, dequantized."""
    import gguf

    return gguf.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)


def round_to_8_bits(x: Float[Tensor, "*tokens columns"], block: int) -> Float[Tensor, "*tokens columns"]:
    """The nearest multiples of a 127th of the largest number of each block, as llama.cpp rounds activations."""
    blocks = x.unflatten(-1, (-1, block))
    unit = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    rounded: Tensor = (blocks / unit).round() * unit
    return rounded.flatten(-2)


def _tensors(location: Location) -> tuple[dict[str, Any], GgufLayout]:
    import gguf

    from dashq.model.loading import read_config

    reader = gguf.GGUFReader(location.folder / GgufFile.file)
    layout = GgufLayout(architecture_of(reader), read_config(location))
    return {tensor.name: tensor for tensor in reader.tensors}, layout


def _logits(model: Any) -> Callable[[list[int]], Tensor]:
    def logits(ids: list[int]) -> Tensor:
        model.reset()
        model.eval(ids)
        return torch.tensor(model.scores[: len(ids)])

    return logits
