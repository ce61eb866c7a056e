"""GGUF: one file for llama.cpp, with plain blocks or with super-blocks."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from dashq import CheckpointError, Grid, Grouping, PlanError, Quantized, Serializer, hookimpl
from dashq.data import StoredLayer
from dashq.programs import Contents, Program
from dashq_plugins.formats.gguf.blocks import TYPES, BlockType
from dashq_plugins.formats.gguf.file import add_metadata, check_config
from dashq_plugins.formats.gguf.names import Names, place
from dashq_plugins.formats.gguf.programs import (
    FILE,
    open_in_float32_with_llama_cpp,
    open_with_gguf,
    open_with_llama_cpp,
    read_config,
)
from dashq_plugins.formats.gguf.tokenizer import Vocabulary
from dashq_plugins.formats.words import refuse_bits, refuse_order, refuse_uneven_stacks

if TYPE_CHECKING:
    import gguf
    import transformers

FILE_TYPES = {"Q4_1": 3, "Q5_1": 9, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15}


class GgufSerializer(Serializer):
    """2, 3 and 4 bits in super-blocks (Q2_K, Q3_K, Q4_K), or 4 and 5 bits in plain blocks (Q4_1, Q5_1), for llama.cpp.

    Run it with `llama-cli -m FOLDER/model.gguf`, or load it with `llama_cpp.Llama("FOLDER/model.gguf")`.
    Layers may differ. Super-blocks of 256 columns need the solver `k_quant`; `four_bits` says what 4 bits are. For
    Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE and Gemma-3. `pre_tokenizer` is llama.cpp's name for it, found out
    if not given.
    """

    name = "gguf"
    programs: ClassVar[Mapping[str, Program]] = {
        "gguf": open_with_gguf,
        "llama.cpp": open_with_llama_cpp,
        "llama.cpp-float32": open_in_float32_with_llama_cpp,
    }
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
                f"format gguf at {q.grid.bits} bits ({kind.name}) needs groups of {kind.size} and a multiple of "
                f"{kind.columns} columns, not groups of {q.grouping.size} and {q.grouping.columns} columns{others}"
            )
        return {"weight": kind.to_bytes(q)}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int, size: int, grid: Grid) -> Quantized:
        codes, scale, offset = self._type(grid.bits).from_bytes(tensors["weight"])
        grouping = Grouping(columns=columns, size=size)
        return Quantized(codes=codes, scale=scale, offset=offset, grouping=grouping, grid=grid)

    def describe(
        self, layers: Sequence[StoredLayer], others: Sequence[str], config: "transformers.PretrainedConfig"
    ) -> Mapping[str, Mapping[str, Any]]:
        return {}

    def check_model(
        self,
        network: "transformers.PreTrainedModel",
        tokenizer: "transformers.PreTrainedTokenizerBase",
        layers: Sequence[StoredLayer],
    ) -> None:
        names = Names(network.config)
        for name in network.state_dict():
            names.in_file(name)
        check_config(names)
        Vocabulary(tokenizer, self.pre_tokenizer)
        refuse_uneven_stacks(network, layers, self.name)

    def file(self, config: "transformers.PretrainedConfig") -> str:
        return FILE

    def write(self, path: Path, contents: Contents) -> None:
        import gguf

        config = read_config(contents.folder)
        names, vocabulary = Names(config), self._vocabulary(contents.folder)
        kinds = []
        with _writing(path, names.architecture) as writer:
            for name, tensor, kind in self._whole(contents):
                if kind:
                    kinds.append(kind.name)
                for file_name, part in names.to_file(name, tensor).items():
                    if kind:
                        writer.add_tensor(
                            file_name, part.contiguous().numpy(), raw_dtype=gguf.GGMLQuantizationType[kind.name]
                        )
                    else:
                        _add_plain(writer, file_name, part.float() + 1 if names.adds_one(name) else part)
            add_metadata(writer, names, FILE_TYPES[max(set(kinds), key=kinds.count)])
            vocabulary.add_to(writer, contents.folder, config.vocab_size)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()

    def read(self, path: Path, contents: Contents) -> Mapping[str, Any]:
        import gguf
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
        for name in [*(f"{layer}.weight" for layer in contents.layers), *expected.state_dict()]:
            whole, expert = place(name)
            parts = names.in_file(whole)
            if all(part in found for part in parts):
                handles[name] = Handle([found[part] for part in parts], whole, names, expert)
        stacks = {handle.name for handle in handles.values() if handle.expert is not None}
        return {name: handle for name, handle in handles.items() if name not in stacks}

    def _whole(self, contents: Contents) -> Iterator[tuple[str, Tensor, BlockType | None]]:
        """Every tensor as the model has it, stacks of experts put together again, and the type of its blocks."""
        for name, handle in contents.tensors.items():
            packed = contents.layers.get(name.removesuffix(".weight"))
            if packed is None:
                yield name, handle[...], None
            elif packed.layer.expert is None:
                yield name, handle[...], self._type(packed.grid.bits)
            elif packed.layer.expert == 0:
                stack, _ = place(name)
                names = takewhile(contents.tensors.__contains__, (f"{stack}.{n}.weight" for n in count()))
                parts = [contents.tensors[expert][...] for expert in names]
                yield stack, torch.stack(parts), self._type(packed.grid.bits)

    def _vocabulary(self, folder: Path) -> Vocabulary:
        from transformers import AutoTokenizer

        return Vocabulary(AutoTokenizer.from_pretrained(folder), self.pre_tokenizer)

    def _type(self, bits: int) -> BlockType:
        refuse_bits(bits, (2, 3, 4, 5), self.name)
        return TYPES[{2: "Q2_K", 3: "Q3_K", 4: self.four_bits, 5: "Q5_1"}[bits]]


@dataclass(frozen=True, eq=False)
class Handle:
    """A tensor of transformers in a GGUF file, or one expert's part of it: the bytes of its blocks, or numbers."""

    parts: Sequence[Any]
    name: str
    names: Names
    expert: int | None

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self.names.from_file(self.name, [self._numbers(part) for part in self.parts])
        tensor = tensor if self.expert is None else tensor[0]
        return tensor - 1 if self.names.adds_one(self.name) else tensor

    def _numbers(self, part: Any) -> Tensor:
        """All that the file holds under one name, or of it the expert's alone."""
        import gguf

        data = part.data if self.expert is None else part.data[self.expert : self.expert + 1]
        numbers = torch.from_numpy(data.copy())
        return numbers.view(torch.bfloat16) if part.tensor_type == gguf.GGMLQuantizationType.BF16 else numbers


@contextmanager
def _writing(path: Path, architecture: str) -> Generator["gguf.GGUFWriter"]:
    """A writer that keeps tensors on disk until the file begins; all that is open is closed, whatever happens."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture, use_temp_file=True)
    try:
        yield writer
    finally:
        writer.close()
        if writer.temp_file is not None:
            writer.temp_file.close()


def _add_plain(writer: "gguf.GGUFWriter", name: str, tensor: Tensor) -> None:
    """Vectors and gates in float32, as llama.cpp wants them; matrices in their own type."""
    import gguf

    tensor = (tensor.float() if tensor.dim() == 1 or "ffn_gate_inp" in name else tensor).contiguous()
    if tensor.dtype == torch.bfloat16:
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    elif tensor.dtype in (torch.float32, torch.float16):
        writer.add_tensor(name, tensor.numpy())
    else:
        raise CheckpointError(f"a GGUF file cannot hold {name} of type {tensor.dtype}")


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [GgufSerializer]
