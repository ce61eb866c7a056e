"""GGUF: one file for llama.cpp, with plain blocks or with super-blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import gguf
import torch
from torch import Tensor

from dashq import CheckpointError, Grid, Grouping, PlanError, Quantized, Serializer, hookimpl
from dashq.data import Packed
from dashq.programs import Contents, Opened, Program
from dashq_plugins._gguf_blocks import TYPES, BlockType
from dashq_plugins._gguf_file import NUMPY, Names, add_metadata, add_tokenizer, plain_tensors, read_config
from dashq_plugins._words import refuse_bits, refuse_order

FILE = "model.gguf"
# llama.cpp rounds activations to 8 bits: up to 0.15 of the largest logit was seen on models that read well otherwise.
LLAMA_CPP_TOLERANCE = 0.2
FILE_TYPES = {"Q4_1": 3, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15}


def open_with_gguf(folder: Path) -> Opened:
    """The dequantizers of the package `gguf`, which are llama.cpp's own in Python."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
    names = Names(read_config(folder))

    def weight(name: str) -> Tensor:
        tensor = found[names.in_file(f"{name}.weight")]
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        order = names.rows(f"{name}.weight", len(values))
        return values if order is None else values[order.argsort()]

    return Opened(weight=weight)


def open_with_llama_cpp(folder: Path) -> Opened:
    """llama.cpp through llama-cpp-python: logits alone, and loosely, since it rounds activations to 8 bits."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports] - optional

    model: Any = Llama(str(folder / FILE), n_ctx=512, logits_all=True, verbose=False)

    def logits(ids: list[int]) -> Tensor:
        model.reset()
        model.eval(ids)
        return torch.tensor(model.scores[: len(ids)])

    return Opened(logits=logits, logits_tolerance=LLAMA_CPP_TOLERANCE)


class GgufSerializer(Serializer):
    """2, 3 and 4 bits in super-blocks (Q2_K, Q3_K, Q4_K), or 4 and 5 bits in plain blocks (Q4_1, Q5_1), for llama.cpp.

    Run it with `llama-cli -m FOLDER/model.gguf`, or load it with `llama_cpp.Llama("FOLDER/model.gguf")`.
    Layers may differ. Super-blocks of 256 columns need the solver `k_quant`; `four_bits` says what 4 bits are. For
    Llama, Mistral, Mixtral, Qwen2, Qwen3 and Gemma-3. `pre_tokenizer` is llama.cpp's name for it, found out if not
    given.
    """

    name = "gguf"
    file = FILE
    programs: ClassVar[Mapping[str, Program]] = {"gguf": open_with_gguf, "llama.cpp": open_with_llama_cpp}
    four_bits: Literal["Q4_K", "Q4_1"] = "Q4_K"
    pre_tokenizer: str | None = None

    def grid(self, bits: int) -> Grid:
        return self._type(bits).grid

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        q, kind = quantized, self._type(quantized.grid.bits)
        refuse_order(q, self.name)
        if q.grouping.size != kind.size or q.grouping.columns % kind.columns:
            others = "" if self.four_bits == "Q4_1" or q.grid.bits != 4 else "; `four_bits: Q4_1` needs multiples of 32"
            raise PlanError(
                f"format gguf at {q.grid.bits} bits ({kind.kind.name}) needs groups of {kind.size} and a multiple of "
                f"{kind.columns} columns, not groups of {q.grouping.size} and {q.grouping.columns} columns{others}"
            )
        return {"weight": kind.to_bytes(q)}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int, size: int, grid: Grid) -> Quantized:
        codes, scale, offset = self._type(grid.bits).from_bytes(tensors["weight"])
        grouping = Grouping(columns=columns, size=size)
        return Quantized(codes=codes, scale=scale, offset=offset, grouping=grouping, grid=grid)

    def describe(self, layers: Sequence[Packed], others: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def write(self, path: Path, contents: Contents) -> None:
        config = read_config(contents.folder)
        names = Names(config)
        writer = gguf.GGUFWriter(path, names.architecture, use_temp_file=True)
        kinds = []
        quantized = {f"{name}.weight" for name in contents.names}
        for name, handle in contents.tensors.items():
            tensor = handle[...]
            if name in quantized:
                kind = self._kind_of(tensor, name, config)
                kinds.append(kind.kind.name)
                order = names.rows(name, len(tensor))
                data = tensor if order is None else tensor[order]
                writer.add_tensor(names.in_file(name), data.numpy(), raw_dtype=kind.kind)
                continue
            for file_name, plain in plain_tensors(names, name, tensor):
                _add_plain(writer, file_name, plain.contiguous())
        add_metadata(writer, config, FILE_TYPES[max(set(kinds), key=kinds.count)])
        add_tokenizer(writer, contents.folder, config.vocab_size, self.pre_tokenizer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def read(self, path: Path, contents: Contents) -> Mapping[str, Any]:
        from transformers import AutoModelForCausalLM

        config = read_config(contents.folder)
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(config)
        try:
            found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        except (OSError, ValueError, IndexError) as error:
            raise CheckpointError(f"{path} is truncated or not a GGUF file: {error}") from error
        names = Names(config)
        handles = {}
        for name in expected.state_dict():
            file_name = names.in_file(name)
            if file_name in found:
                handles[name] = Handle(found[file_name], name, names)
        return handles

    def _type(self, bits: int) -> BlockType:
        refuse_bits(bits, (2, 3, 4, 5), self.name)
        return TYPES[{2: "Q2_K", 3: "Q3_K", 4: self.four_bits, 5: "Q5_1"}[bits]]

    def _kind_of(self, data: Tensor, name: str, config: Any) -> BlockType:
        columns = config.intermediate_size if name.endswith("down_proj.weight") else None
        if name.endswith("o_proj.weight"):
            columns = config.num_attention_heads * (
                getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            )
        columns = columns or config.hidden_size
        for bits in (2, 3, 4, 5):
            kind = self._type(bits)
            if columns % kind.columns == 0 and columns // kind.columns * kind.bytes == data.shape[1]:
                return kind
        raise CheckpointError(
            f"the tensor {name} has rows of {data.shape[1]} bytes, which is no GGUF type of {columns} columns"
        )


@dataclass(frozen=True, eq=False)
class Handle:
    """One tensor of a GGUF file: the bytes of its blocks, or numbers, with rows and norms as transformers has them."""

    tensor: Any
    name: str
    names: Names

    def __getitem__(self, index: Any) -> Tensor:
        kind = self.tensor.tensor_type
        data = torch.from_numpy(self.tensor.data.copy())
        if kind == gguf.GGMLQuantizationType.BF16:
            data = data.view(torch.bfloat16)
        order = self.names.rows(self.name, len(data))
        data = data if order is None else data[order.argsort()]
        return data - 1 if self.names.architecture == "gemma3" and self.name.endswith("norm.weight") else data


def _add_plain(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.bfloat16:
        shape = tensor.shape
        writer.add_tensor(
            name, tensor.view(torch.uint8).numpy(), raw_shape=None, raw_dtype=gguf.GGMLQuantizationType.BF16
        )
        assert len(shape) > 1
        return
    if tensor.dtype not in NUMPY:
        raise CheckpointError(f"a GGUF file cannot hold {name} of type {tensor.dtype}")
    writer.add_tensor(name, tensor.numpy())


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [GgufSerializer]
