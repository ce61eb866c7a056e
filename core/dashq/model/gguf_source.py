"""Weights in a GGUF file, dequantized one tensor at a time under their transformers names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dashq.errors import CheckpointError
from dashq.model.source import Header, Source
from dashq.model.transformers_internals import GgufHeader, LazyGgufTensor, load_gguf_state_dict

PLAIN_DTYPES: Mapping[int, torch.dtype] = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}
Mend = Callable[[Tensor, str, PretrainedConfig], Tensor]


def _unchanged(weight: Float[Tensor, "*shape"], name: str, config: PretrainedConfig) -> Float[Tensor, "*shape"]:
    return weight


def _split_rotary_halves(
    weight: Float[Tensor, "*shape"], name: str, config: PretrainedConfig
) -> Float[Tensor, "*shape"]:
    # llama.cpp interleaves the two halves that rotary embeddings turn; transformers keeps them apart.
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _subtract_one_from_norms(
    weight: Float[Tensor, "*shape"], name: str, config: PretrainedConfig
) -> Float[Tensor, "*shape"]:
    # llama.cpp stores the factor, Gemma's modules add 1 to what they hold.
    return weight - 1 if name.endswith("norm.weight") else weight


# Functions that undo, after reading, how llama.cpp stores tensors, by the architecture that the file names.
ARCHITECTURES: Mapping[str, Mend] = {
    "llama": _split_rotary_halves,
    "qwen2": _unchanged,
    "qwen3": _unchanged,
    "phi3": _unchanged,
    "gemma2": _subtract_one_from_norms,
    "gemma3": _subtract_one_from_norms,
}


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of the file, read and dequantized when it is indexed."""

    raw: LazyGgufTensor
    name: str
    mend: Mend
    config: PretrainedConfig
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Tensor:
        values = self.raw[...]
        if values.dtype == torch.uint8:  # blocks, not numbers
            kind = gguf.GGMLQuantizationType(self.raw.ggml_type)
            values = torch.from_numpy(gguf.dequantize(values.numpy(), kind)).reshape(self.shape)
        return self.mend(values, self.name, self.config)

    def get_dtype(self) -> str:
        """The type of the values, in the words of safetensors."""
        return "F32"


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file; `CheckpointError` where it is not whole, or of an architecture that is not known."""
    try:
        header = GgufHeader.from_file(str(path))
    except Exception as error:  # the parser trusts its input, and fails in any way
        raise CheckpointError(f"{path} is truncated or not a GGUF file: {error}") from error
    if header.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{path}: cannot read GGUF files of architecture {header.architecture!r}. Known: {known}")
    needed = max((header.data_start + info.offset + info.nbytes for info in header.tensors), default=0)
    if path.stat().st_size < needed:
        raise CheckpointError(f"{path} is truncated: {path.stat().st_size} bytes, its header needs {needed}")
    return header


class Gguf(Source):
    """One GGUF file of an architecture in `ARCHITECTURES`."""

    def __init__(self, header: GgufHeader, network: PreTrainedModel) -> None:
        self._header = header
        self._mend = ARCHITECTURES[header.architecture]
        self._config = network.config
        self._names = _names_in_file(network, header.architecture)
        homeless = sorted({info.name for info in header.tensors} - set(self._names.values()))
        if homeless:
            raise CheckpointError(
                f"{header.path}: the {header.architecture} of transformers, as this file configures it, has no place "
                f"for {len(homeless)} of its tensors, such as {homeless[0]}. Use the model's safetensors"
            )

    def headers(self) -> Mapping[str, Header]:
        infos = {info.name: info for info in self._header.tensors}
        return {
            key: Header(infos[name].shape, PLAIN_DTYPES.get(infos[name].ggml_type))
            for key, name in self._names.items()
            if name in infos
        }

    def lazy(self, keys: list[str]) -> Mapping[str, Any]:
        raw = load_gguf_state_dict(self._header)
        headers = self.headers()
        return {
            key: LazyTensor(raw[self._names[key]], self._names[key], self._mend, self._config, headers[key].shape)
            for key in keys
        }

    def conversions(self, network: PreTrainedModel) -> list[Any]:
        return []


def _names_in_file(network: PreTrainedModel, architecture: str) -> Mapping[str, str]:
    """The file's name of every parameter that GGUF knows."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(kind, network.config.num_hidden_layers)
    names = {key: known.get_name(key, try_suffixes=(".weight", ".bias")) for key in network.state_dict()}
    return {key: name for key, name in names.items() if name is not None}
