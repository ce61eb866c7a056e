"""The affine format that stock transformers opens as `quant_method: metal`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq import Grid, PlanError, Program, Quantized, Serializer, StoredLayer, hookimpl
from dashq_plugins.formats.affine import pack_affine, unpack_affine
from dashq_plugins.formats.open_with_transformers import open_with_transformers
from dashq_plugins.formats.words import (
    refuse_bits,
    refuse_foreign,
    refuse_order,
    refuse_other_scales,
    refuse_short_groups,
    settings_of,
)

if TYPE_CHECKING:
    import transformers


OPENING = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{model}", device_map="cpu")
tokenizer = AutoTokenizer.from_pretrained("{model}")
"""


class MetalSerializer(Serializer):
    """2, 4 or 8 bits with a real zero, one setting for the whole model. Opens in stock transformers.

    Load it with `AutoModelForCausalLM.from_pretrained(FOLDER, device_map="cpu")` in transformers 5.17 or later; off
    Apple hardware the weights are dense once loaded.
    """

    name = "metal"
    openings: ClassVar[Mapping[str, str]] = {"transformers": OPENING}
    holds_experts = False
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def grid(self, bits: int) -> Grid:
        refuse_bits(bits, (2, 4, 8), self.name)
        return Grid(bits=bits, dtype=getattr(torch, self.dtype))

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        q = quantized
        refuse_order(q, self.name)
        refuse_short_groups(q.grouping, self.name)
        if q.grouping.columns * q.grid.bits % 32:
            raise PlanError(f"format metal needs rows of whole 32-bit words, not {q.grouping.columns} columns")
        return pack_affine(q, "qbiases")

    def unpack(self, tensors: Mapping[str, Shaped[Tensor, "..."]], columns: int, size: int, grid: Grid) -> Quantized:
        return unpack_affine(tensors, "qbiases", columns, size, grid)

    def check(self, layers: Sequence[StoredLayer]) -> None:
        first = layers[0]
        for stored in layers:
            if settings_of(stored) != settings_of(first):
                raise PlanError(
                    f"{stored.layer.name}: format metal has one setting for the whole model, and "
                    f"{first.layer.name} has {first.grid.bits} bits in groups of {first.size}, not {stored.grid.bits} "
                    f"in groups of {stored.size}"
                )

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
        settings = {
            "quant_method": "metal",
            "bits": layers[0].grid.bits,
            "group_size": layers[0].size,
            "modules_to_not_convert": list(unquantized),
        }
        return {"config.json": {"quantization_config": settings}}


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [MetalSerializer]


@hookimpl
def dashq_programs() -> list[Program]:
    return [Program(name="transformers", format=MetalSerializer.name, open=open_with_transformers)]
