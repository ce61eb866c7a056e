"""The one file of a GGUF result: tensors under llama.cpp's names, what it says of the model, and its vocabulary."""

import shutil
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq import CheckpointError, Container, Contents
from dashq.device import type_name
from dashq.model.gguf_layout import GgufLayout
from dashq.model.gguf_states import BARE
from dashq.model.location import Location
from dashq.model.tokenizing import added_tokens
from dashq_plugins.formats.gguf.blocks import BlockType, type_of
from dashq_plugins.formats.gguf.carried import architecture_of, copy_tensor, numbers, original_of
from dashq_plugins.formats.gguf.metadata import add_metadata
from dashq_plugins.formats.gguf.modelfile import MODELFILE, modelfile
from dashq_plugins.formats.gguf.names import layout_of, place
from dashq_plugins.formats.gguf.tokenizer import ENDS, Vocabulary

if TYPE_CHECKING:
    import gguf

# The name of the file's type as a whole in `gguf.LlamaFileType`, by the type that most of its quantized tensors have.
FILE_TYPES = {
    "Q4_0": "MOSTLY_Q4_0",
    "Q4_1": "MOSTLY_Q4_1",
    "Q5_0": "MOSTLY_Q5_0",
    "Q5_1": "MOSTLY_Q5_1",
    "Q8_0": "MOSTLY_Q8_0",
    "Q2_K": "MOSTLY_Q2_K",
    "Q3_K": "MOSTLY_Q3_K_M",
    "Q4_K": "MOSTLY_Q4_K_M",
    "Q5_K": "MOSTLY_Q5_K_M",
    "Q6_K": "MOSTLY_Q6_K",
    "IQ2_S": "MOSTLY_IQ2_M",
    "IQ3_S": "MOSTLY_IQ3_S",
    "IQ4_XS": "MOSTLY_IQ4_XS",
    "IQ4_NL": "MOSTLY_IQ4_NL",
}
# Endings of what is held in float32 though it is no vector.
FILTERS = ("shortconv.conv", "ssm_conv1d", "ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v")
EXACT = (".bias", "ffn_gate_inp.weight", "ssm_norm.weight", *(f"{name}.weight" for name in FILTERS), *BARE)


@dataclass(frozen=True)
class GgufFile(Container):
    """The file of one model; `pre_tokenizer` is as in `Vocabulary`, and with `modelfile` Ollama's lies beside it."""

    pre_tokenizer: str | None
    modelfile: bool = False
    file = "model.gguf"

    def write(self, path: Path, contents: Contents) -> None:
        import gguf

        from dashq.model.loading import read_config

        config = read_config(Location.of(contents))
        original = original_of(contents.source, config)
        layout = original.layout if original else layout_of(config)
        types: Counter[str] = Counter()
        written: set[str] = set()
        lists: defaultdict[str, dict[int, float]] = defaultdict(dict)  # of numbers, one for each layer
        with _writing(path, layout.architecture) as writer:
            if original:  # first, since tensors lie as far apart as it says
                original.add_metadata(writer, _ends(contents))
            for name, tensor, block_type in _stacked(contents):
                if entry := layout.entry(name):
                    lists[entry[0]][entry[1]] = float(tensor)
                    continue
                if block_type:
                    types[block_type.name] += 1
                elif original and (parts := original.same(name, tensor)):
                    for part in parts:
                        written.add(part.name)
                        copy_tensor(part, writer)
                    continue
                if layout.transposed(name) and not block_type:
                    tensor = tensor.mT
                for file_name, part in layout.to_file(name, tensor).items():
                    written.add(file_name)
                    if block_type:
                        writer.add_tensor(file_name, part.contiguous().numpy(), raw_dtype=block_type.kind)
                    else:
                        _add_plain(writer, file_name, part)
            writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[types.most_common(1)[0][0]]])
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            if original:
                for part in original.others(written):
                    copy_tensor(part, writer)
            else:
                add_metadata(writer, layout)
                for key, values in lists.items():
                    writer.add_array(key, [values[layer] for layer in sorted(values)])
                self._add_vocabulary(writer, contents, config.vocab_size)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()

    def _add_vocabulary(self, writer: "gguf.GGUFWriter", contents: Contents, size: int) -> None:
        from dashq.model.loading import read_tokenizer

        tokenizer = read_tokenizer(Location.of(contents))
        with TemporaryDirectory() as folder:  # the package reads only the files that are usual today
            tokenizer.save_pretrained(folder)
            shutil.copy(contents.folder / "config.json", folder)
            Vocabulary(tokenizer, self.pre_tokenizer).add_to(writer, Path(folder), size)

    def beside(self, contents: Contents) -> Mapping[str, str]:
        from dashq.model.loading import read_tokenizer

        if not self.modelfile:
            return {}
        tokenizer = read_tokenizer(Location.of(contents))
        begins = bool(added_tokens(tokenizer)[0])
        return {MODELFILE: modelfile(contents.folder, self.file, tokenizer, begins)}

    def read(self, path: Path, contents: Contents) -> Mapping[str, Any]:
        import gguf

        from dashq.model.loading import network_of, read_config

        location = Location.of(contents)
        config = read_config(location)
        with torch.device("meta"):
            expected = network_of(config, location)
        try:
            reader = gguf.GGUFReader(path)
            layout = GgufLayout(architecture_of(reader), config)
            tensors = {tensor.name: tensor for tensor in reader.tensors}
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{path} is truncated or not a GGUF file: {error}") from error
        handles = {}
        packed = dict.fromkeys(f"{layer}.weight" for layer in contents.layers)
        for name in [*packed, *expected.state_dict()]:
            whole, expert = place(name)
            parts = layout.names(whole)
            if parts and all(part in tensors for part in parts):
                own = [tensors[part] for part in parts]
                handles[name] = GgufTensor(own, whole, layout, expert, packed=name in packed)
        stacks = {handle.name for handle in handles.values() if handle.expert is not None}
        listed = _listed(expected.state_dict(), layout, reader)
        return {**{name: handle for name, handle in handles.items() if name not in stacks}, **listed}

    def settings(self, path: Path, contents: Contents) -> Mapping[str, tuple[Any, Any]]:
        import gguf

        fields = gguf.GGUFReader(path).fields
        ends = _ends(contents)
        return {name: (adds, fields[name].contents() if name in fields else None) for name, adds in ends.items()}


def _ends(contents: Contents) -> Mapping[str, bool]:
    """The entries that say whether texts begin, and end, with a token."""
    from dashq.model.loading import read_tokenizer

    added = zip(ENDS, added_tokens(read_tokenizer(Location.of(contents))), strict=True)
    return {f"tokenizer.ggml.add_{kind}_token": bool(tokens) for kind, tokens in added}


def _listed(
    parameters: Mapping[str, Shaped[Tensor, "..."]], layout: GgufLayout, reader: "gguf.GGUFReader"
) -> Mapping[str, Tensor]:
    """The parameters that are entries of the file, in lists of one number for each layer."""
    found = {}
    for name, parameter in parameters.items():
        key, layer = layout.entry(name) or ("", 0)
        values = reader.fields[key].contents() if key in reader.fields else []
        if layer < len(values):
            found[name] = torch.full(parameter.shape, values[layer])
    return found


def _stacked(contents: Contents) -> Iterator[tuple[str, Tensor, BlockType | None]]:
    """Every tensor as the model has it, stacks of matrices put together again, and the type of its blocks."""
    for name, handle in contents.tensors.items():
        stored = contents.layers.get(name.removesuffix(".weight"))
        block_type = type_of(stored.grid) if stored else None
        stack, number = place(name)
        if number is None:
            yield name, handle[...], block_type
        elif number == 0:
            names = takewhile(contents.tensors.__contains__, (f"{stack}.{n}.weight" for n in count()))
            yield stack, torch.stack([contents.tensors[part][...] for part in names]), block_type


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A handle of a tensor of transformers in a GGUF file, or of one expert's or matrix' part of a stack.

    It reads bytes of blocks where they are those of a `packed` layer, and numbers elsewhere: a file that a model was
    read from may have packed others as well.
    """

    parts: Sequence[Any]
    name: str
    layout: GgufLayout
    expert: int | None
    packed: bool

    def __getitem__(self, index: Any) -> Tensor:
        parts = [self._bytes(part) if self.packed else numbers(part) for part in self.parts]
        tensor = self.layout.from_file(self.name, parts)
        if self.expert is not None:
            return tensor[0 if self.packed else self.expert]
        return tensor.mT if not self.packed and self.layout.transposed(self.name) else tensor

    def _bytes(self, part: Any) -> Tensor:
        """All that the file holds under one name, or of it the expert's alone."""
        data = part.data if self.expert is None else part.data[self.expert : self.expert + 1]
        return torch.from_numpy(data.copy())


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


def _add_plain(writer: "gguf.GGUFWriter", name: str, tensor: Shaped[Tensor, "..."]) -> None:
    """Vectors, biases, gates and filters in float32, as llama.cpp wants them; matrices in their own type."""
    import gguf

    exact = tensor.dim() == 1 or name.endswith(EXACT)
    tensor = (tensor.float() if exact else tensor).contiguous()
    if tensor.dtype == torch.bfloat16:
        writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
    elif tensor.dtype in (torch.float32, torch.float16):
        writer.add_tensor(name, tensor.numpy())
    else:
        raise CheckpointError(f"a GGUF file cannot hold {name} of type {type_name(tensor.dtype)}")
