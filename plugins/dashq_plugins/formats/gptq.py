"""The format of GPTQ's programs: zeros that are codes, packed along the inputs."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq import Grid, Opened, PlanError, Program, Quantized, Serializer, StoredLayer, hookimpl
from dashq_plugins.formats.vllm import open_with_vllm
from dashq_plugins.formats.words import (
    flat_codes,
    from_whole_zeros,
    pack_words,
    refuse_bits,
    refuse_foreign,
    refuse_order,
    refuse_short_groups,
    refuse_stacks,
    settings_of,
    unpack_words,
    whole_zeros,
)

if TYPE_CHECKING:
    import transformers

SIDE_FILE = "quantize_config.json"
# vLLM's names of fused layers, by the first of their parts.
FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}


def open_with_gptqmodel(folder: Path, trust_remote_code: bool) -> Opened:
    """GPTQModel's kernel for the CPU in plain PyTorch, which dequantizes in the scales' type."""
    from gptqmodel import BACKEND, GPTQModel  # pyright: ignore[reportMissingImports] - optional

    model: Any = GPTQModel.load(
        str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16, trust_remote_code=trust_remote_code
    )

    def weight(name: str) -> Tensor:
        result: Tensor = model.model.get_submodule(name).dequantize_weight().T
        return result

    @torch.inference_mode()
    def logits(ids: list[int]) -> Tensor:
        result: Tensor = model.model(torch.tensor([ids])).logits[0].float()
        return result

    return Opened(weight=weight, logits=logits, logits_tolerance=2e-2)


class GptqSerializer(Serializer):
    """2, 3, 4 or 8 bits with a symmetric or whole zero and float16 scales; layers may differ.

    Load it with `GPTQModel.load(FOLDER)`, with transformers where gptqmodel is installed, or at 4 bits with symmetric
    zeros with `vllm.LLM(FOLDER, dtype="float16")`. Version 1 stores zeros less one, and is for symmetric zeros alone.
    """

    name = "gptq"
    openings: ClassVar[Mapping[str, str]] = {
        "GPTQModel": 'from gptqmodel import GPTQModel\n\nmodel = GPTQModel.load("{model}")\n',
        "vLLM, at 4 bits with symmetric zeros": "$ vllm serve {model} --dtype float16",
    }
    holds_experts = False
    holds_head = True
    runtimes_fuse_layers = True
    files = (SIDE_FILE,)
    version: Literal[1, 2] = 2
    zero: Literal["symmetric", "integer"] = "integer"

    def grid(self, bits: int) -> Grid:
        refuse_bits(bits, (2, 3, 4, 8), self.name)
        if self.version == 1 and self.zero != "symmetric":
            raise PlanError("format gptq of version 1 cannot hold every whole zero: take version 2, or symmetric zeros")
        return Grid(bits=bits, dtype=torch.float16, zero=self.zero)

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        q = quantized
        refuse_order(q, self.name)
        refuse_short_groups(q.grouping, self.name)
        rows, columns, bits = len(q.codes), q.grouping.columns, q.grid.bits
        if rows % 32 or columns % 32:
            raise PlanError(f"format gptq needs multiples of 32 rows and columns, not {rows}×{columns}")
        zeros = whole_zeros(q) - 1 if self.version == 1 else whole_zeros(q)
        if q.codes.is_meta:  # to divide without values takes longer than all else
            groups = torch.empty(columns, dtype=torch.int32, device="meta")
        else:
            groups = torch.arange(columns, dtype=torch.int32, device=q.codes.device) // q.grouping.size
        # `qweight` [columns in words, rows]: a word holds neighbouring inputs of one output, so words lie along the
        # inputs; `qzeros` [groups, rows in words]: a word holds the zeros of neighbouring outputs. `g_idx` holds
        # the group of each input.
        return {
            "qweight": pack_words(flat_codes(q), bits).T.contiguous(),
            "qzeros": pack_words(zeros.T, bits),
            "scales": q.scale.T.contiguous(),
            "g_idx": groups,
        }

    def unpack(self, tensors: Mapping[str, Shaped[Tensor, "..."]], columns: int, size: int, grid: Grid) -> Quantized:
        scale = tensors["scales"].T.contiguous()
        zeros = unpack_words(tensors["qzeros"], grid.bits, len(scale)).T + int(self.version == 1)
        if not torch.compiler.is_compiling():  # a compiled graph cannot hang on values
            if not tensors["g_idx"].equal(torch.arange(columns, dtype=torch.int32, device=scale.device) // size):
                raise ValueError("its columns are in another order (g_idx), which dashq does not read")
            if int(zeros.max()) > grid.top:
                raise ValueError(f"a zero is above the largest code, {grid.top}")
        return from_whole_zeros(unpack_words(tensors["qweight"].T, grid.bits, columns), scale, zeros, size, grid)

    def check_model(
        self,
        network: "transformers.PreTrainedModel",
        tokenizer: "transformers.PreTrainedTokenizerBase",
        layers: Sequence[StoredLayer],
        source: Path | None,
    ) -> None:
        refuse_foreign(network, layers, self.name)
        refuse_stacks(network, self.name)

    def describe(
        self, layers: Sequence[StoredLayer], unquantized: Sequence[str], config: "transformers.PretrainedConfig"
    ) -> Mapping[str, Mapping[str, Any]]:
        first = layers[0]
        # Per module: "-:" leaves one alone, "+:" gives it other settings; the names are regular expressions.
        own = {
            f"+:^{_pattern(stored.layer.name)}$": {"bits": stored.grid.bits, "group_size": stored.size}
            for stored in layers
            if settings_of(stored) != settings_of(first)
        }
        settings: dict[str, Any] = {
            "bits": first.grid.bits,
            "group_size": first.size,
            "desc_act": False,
            "sym": self.zero == "symmetric",
            "lm_head": any(stored.layer.role == "head" for stored in layers),
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
            "dynamic": own | {f"-:^{re.escape(name)}$": {} for name in unquantized},
            "meta": {"quantizer": ["gptqmodel:7.7.0"], "made_by": ["dashq"]},
        }
        return {"config.json": {"quantization_config": settings}, SIDE_FILE: settings}


def _pattern(name: str) -> str:
    """A layer's name, and that of vLLM's fused layer for the first of its parts, which all have the same settings."""
    owner, _, last = name.rpartition(".")
    return re.escape(f"{owner}.") + (f"({last}|{FUSED[last]})" if last in FUSED else re.escape(last))


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [GptqSerializer]


# In float16 as the scales are, which vLLM rounds to the type that it computes in.
open_in_float16_with_vllm = partial(open_with_vllm, dtype="float16")


@hookimpl
def dashq_programs() -> list[Program]:
    name = GptqSerializer.name
    return [
        Program(name="gptqmodel", format=name, open=open_with_gptqmodel),
        Program(name="vllm", format=name, open=open_in_float16_with_vllm),
    ]
