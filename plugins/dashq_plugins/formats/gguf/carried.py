"""A GGUF file that a model was read from: all that it says goes into the result as it is, but the quantized tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq.model.gguf_layout import GgufLayout

if TYPE_CHECKING:
    import gguf
    import transformers

# Written anew: the writer's own, and those that tell how tensors are packed.
OWN = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")


class Original:
    """The file at `path`, of a model with this configuration."""

    def __init__(self, path: Path, config: "transformers.PretrainedConfig") -> None:
        import gguf

        self._reader = gguf.GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.layout = GgufLayout(architecture_of(self._reader), config)

    def add_metadata(self, writer: "gguf.GGUFWriter", ends: Mapping[str, bool]) -> None:
        """Write all entries but those that tell how tensors are packed, and those of `ends` that it leaves open."""
        copy_fields(self._reader, writer)
        for name, adds in ends.items():
            if name not in self._reader.fields:
                writer.add_bool(name, adds)

    def same(self, parameter: str, tensor: Shaped[Tensor, "..."]) -> Sequence[Any]:
        """The file's tensors where they hold the values of this parameter of transformers; none where they do not."""
        parts = [self._tensors.get(name) for name in self.layout.names(parameter)]
        if not parts or None in parts:
            return ()
        held = self.layout.from_file(parameter, [numbers(part) for part in parts])
        held = held.mT if self.layout.transposed(parameter) else held
        return parts if held.to(tensor.dtype).equal(tensor) else ()

    def others(self, written: set[str]) -> Sequence[Any]:
        """The file's tensors of other names than those that are `written`."""
        return [tensor for name, tensor in self._tensors.items() if name not in written]


def original_of(source: Path | None, config: "transformers.PretrainedConfig") -> Original | None:
    """The GGUF file that a model was read from; None where it was read from anything else."""
    return Original(source, config) if source and source.suffix == ".gguf" else None


def architecture_of(reader: "gguf.GGUFReader") -> str:
    """The architecture that a file says it is of."""
    return str(reader.fields["general.architecture"].contents())


def numbers(tensor: Any) -> Shaped[Tensor, "..."]:
    """The numbers of a reader's tensor in the type that the file has them in; those of blocks in float32."""
    import gguf

    if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return torch.from_numpy(tensor.data.copy())
    if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
        return torch.from_numpy(tensor.data.copy()).view(torch.bfloat16)
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))


def copy_fields(reader: "gguf.GGUFReader", writer: "gguf.GGUFWriter") -> None:
    """Write a file's entries as another has them, but those in `OWN`."""
    if "general.alignment" in reader.fields:
        writer.add_custom_alignment(reader.fields["general.alignment"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in OWN:
            inner = field.types[-1] if len(field.types) > 1 else None  # of an array's entries
            writer.add_key_value(name, field.contents(), field.types[0], inner)


def copy_tensor(tensor: Any, writer: "gguf.GGUFWriter") -> None:
    """Write a reader's tensor as it is, byte by byte."""
    writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
