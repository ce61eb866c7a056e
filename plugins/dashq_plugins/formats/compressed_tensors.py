"""The pack-quantized format of compressed-tensors: zeros that are codes, for transformers and vLLM."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq import Grid, Program, Quantized, Serializer, StoredLayer, hookimpl
from dashq_plugins.formats.open_with_transformers import open_with_transformers
from dashq_plugins.formats.vllm import open_with_vllm
from dashq_plugins.formats.words import (
    flat_codes,
    from_whole_zeros,
    pack_words,
    refuse_bits,
    refuse_foreign,
    refuse_order,
    refuse_other_scales,
    refuse_short_groups,
    settings_of,
    unpack_words,
    whole_zeros,
)

if TYPE_CHECKING:
    import transformers


OPENING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")
"""


class CompressedTensorsSerializer(Serializer):
    """2 to 8 bits with a symmetric or whole zero, any group size that divides the columns; layers may differ.

    Load it with `AutoModelForCausalLM.from_pretrained(FOLDER)` where compressed-tensors is installed, or at 4 bits with
    `vllm.LLM(FOLDER)`; other bits need a kernel that vLLM does not have on every machine. With whole zeros,
    transformers opens it dense.
    """

    name = "compressed-tensors"
    openings: ClassVar[Mapping[str, str]] = {
        "transformers, with compressed-tensors": OPENING,
        "vLLM, at 4 bits": "$ vllm serve {model}",
    }
    holds_experts = False
    holds_head = True
    runtimes_fuse_layers = True
    zero: Literal["symmetric", "integer"] = "symmetric"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def grid(self, bits: int) -> Grid:
        refuse_bits(bits, (2, 3, 4, 5, 6, 7, 8), self.name)
        return Grid(bits=bits, dtype=getattr(torch, self.dtype), zero=self.zero)

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        q = quantized
        refuse_order(q, self.name)
        refuse_short_groups(q.grouping, self.name)
        shape = torch.tensor([len(q.codes), q.grouping.columns])
        tensors = {
            "weight_packed": pack_words(flat_codes(q), q.grid.bits),
            "weight_scale": q.scale,
            "weight_shape": torch.empty(2, dtype=torch.int64, device="meta") if q.codes.is_meta else shape,
        }
        if q.grid.zero == "symmetric":
            return tensors
        return tensors | {"weight_zero_point": pack_words(whole_zeros(q).T, q.grid.bits).T.contiguous()}

    def unpack(self, tensors: Mapping[str, Shaped[Tensor, "..."]], columns: int, size: int, grid: Grid) -> Quantized:
        scale = tensors["weight_scale"]
        if not torch.compiler.is_compiling():  # a compiled graph cannot hang on values
            shape = tensors["weight_shape"].tolist()
            if shape != [len(scale), columns]:
                raise ValueError(f"its weight_shape is {shape}, and its scales are of {[len(scale), columns]}")
        zeros = torch.tensor([[grid.middle]], device=scale.device)
        if grid.zero == "integer":
            zeros = unpack_words(tensors["weight_zero_point"].T, grid.bits, len(scale)).T
        codes = unpack_words(tensors["weight_packed"], grid.bits, columns)
        return from_whole_zeros(codes, scale, zeros, size, grid)

    def check_model(
        self,
        network: "transformers.PreTrainedModel",
        tokenizer: "transformers.PreTrainedTokenizerBase",
        layers: Sequence[StoredLayer],
        source: Path | None,
    ) -> None:
        refuse_foreign(network, layers, self.name)
        refuse_other_scales(network, self.dtype, self.name)

    def describe(
        self, layers: Sequence[StoredLayer], unquantized: Sequence[str], config: "transformers.PretrainedConfig"
    ) -> Mapping[str, Mapping[str, Any]]:
        kinds = groupby(sorted(layers, key=settings_of), key=settings_of)
        groups = {
            f"group_{number}": {
                "targets": [_target(stored.layer.name) for stored in members],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": self.zero == "symmetric",
                    "strategy": "group",
                    "group_size": size,
                },
            }
            for number, ((bits, size), members) in enumerate(kinds)
        }
        settings: dict[str, Any] = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": list(unquantized),
            "config_groups": groups,
        }
        if self.zero == "integer":
            settings["dequantize"] = True  # the only way in which transformers computes with whole zeros
        return {"config.json": {"quantization_config": settings}}


def _target(name: str) -> str:
    """A pattern for a layer, with the head's part of its name or, as the model is called without its head, without."""
    first, _, rest = name.partition(".")
    if not rest:  # the head itself
        return f"re:{re.escape(name)}$"
    return rf"re:({re.escape(first)}\.)?{re.escape(rest)}$"


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [CompressedTensorsSerializer]


@hookimpl
def dashq_programs() -> list[Program]:
    name = CompressedTensorsSerializer.name
    return [
        Program(name="transformers", format=name, open=open_with_transformers),
        Program(name="vllm", format=name, open=open_with_vllm),
    ]
