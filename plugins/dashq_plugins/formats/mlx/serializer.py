"""The affine format of MLX: real zeros, for mlx-lm."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy
import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq import Container, Grid, Opened, PlanError, Program, Quantized, Serializer, StoredLayer, hookimpl
from dashq.model.location import Location
from dashq_plugins.formats.affine import pack_affine, unpack_affine
from dashq_plugins.formats.mlx.mixtures import FAMILIES, KEYS, MixtureFile, check_mixture, modules, place
from dashq_plugins.formats.words import refuse_bits, refuse_foreign, refuse_order, refuse_short_groups, settings_of

if TYPE_CHECKING:
    import transformers

SIZES = (32, 64, 128)  # others are read as garbage at 2 and 3 bits


def open_with_mlx(folder: Path, trust_remote_code: bool) -> Opened:
    """MLX's own dequantization, in float32 so that its rounding to half precision does not blur the comparison."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports] - optional
    from safetensors.torch import load_file

    from dashq.model.loading import read_config

    settings = json.loads((folder / "config.json").read_text())["quantization"]
    tensors = {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}
    config = read_config(Location(folder, trust_remote_code=trust_remote_code))

    def part(module: str, expert: int | None) -> Tensor:
        own = settings.get(module, settings)
        stacks = [tensors[f"{module}.{key}"] for key in KEYS]
        codes, scales, biases = stacks if expert is None else [stack[expert] for stack in stacks]
        result = mx.dequantize(
            mx.array(codes.numpy()),
            mx.array(scales.float().numpy()),
            mx.array(biases.float().numpy()),
            group_size=own["group_size"],
            bits=own["bits"],
        )
        return torch.from_numpy(numpy.array(result))

    def weight(name: str) -> Tensor:
        _, expert = place(f"{name}.weight", config)
        return torch.cat([part(module, expert) for module in modules(name, config)])

    return Opened(weight=weight)


def open_with_mlx_lm(folder: Path, trust_remote_code: bool) -> Opened:
    """mlx-lm, its kernels for packed weights included, computing in float32."""
    import mlx.core as mx  # pyright: ignore[reportMissingImports] - optional
    import mlx_lm  # pyright: ignore[reportMissingImports] - optional

    model: Any = mlx_lm.load(
        str(folder),
        trust_remote_code=trust_remote_code,
        tokenizer_config={"trust_remote_code": trust_remote_code},
    )[0]
    model.set_dtype(mx.float32)

    def logits(ids: list[int]) -> Tensor:
        return torch.from_numpy(numpy.array(model(mx.array([ids]))[0]))

    return Opened(logits=logits)


class MlxSerializer(Serializer):
    """2, 3, 4, 5, 6 or 8 bits with a real zero in groups of 32, 64 or 128; each layer its own. Opens in mlx-lm.

    Load it with `mlx_lm.load(FOLDER)`, on a Mac, on Linux with `mlx[cpu]`, or on CUDA. Mixtures of experts: Mixtral,
    Qwen2-MoE, Qwen3-MoE, OLMoE and DeepSeek-V2, in one file, with all experts of a stack alike.
    """

    name = "mlx"
    stacks_experts = True
    holds_embeddings = True
    holds_head = True
    library = "mlx"
    openings: ClassVar[Mapping[str, str]] = {
        "mlx-lm": 'from mlx_lm import generate, load\n\nmodel, tokenizer = load("{model}")\n',
        "mlx-lm on the command line": "$ mlx_lm.generate --model {model} --prompt 'The capital of France is'",
    }
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def grid(self, bits: int) -> Grid:
        refuse_bits(bits, (2, 3, 4, 5, 6, 8), self.name)
        return Grid(bits=bits, dtype=getattr(torch, self.dtype))

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        q = quantized
        refuse_order(q, self.name)
        if q.grouping.size not in SIZES:
            raise PlanError(f"format mlx holds groups of 32, 64 or 128, not {q.grouping.size}")
        refuse_short_groups(q.grouping, self.name)
        return pack_affine(q, "biases")

    def unpack(self, tensors: Mapping[str, Shaped[Tensor, "..."]], columns: int, size: int, grid: Grid) -> Quantized:
        return unpack_affine(tensors, "biases", columns, size, grid)

    def check_model(
        self,
        network: "transformers.PreTrainedModel",
        tokenizer: "transformers.PreTrainedTokenizerBase",
        layers: Sequence[StoredLayer],
        source: Path | None,
    ) -> None:
        check_mixture(network, layers, self.name)
        refuse_foreign(network, [stored for stored in layers if stored.layer.expert is None], self.name)

    def describe(
        self, layers: Sequence[StoredLayer], unquantized: Sequence[str], config: "transformers.PretrainedConfig"
    ) -> Mapping[str, Mapping[str, Any]]:
        first = layers[0]
        common: dict[str, Any] = {"group_size": first.size, "bits": first.grid.bits, "mode": "affine"}
        own = {
            module: {"group_size": stored.size, "bits": stored.grid.bits}
            for stored in layers
            for module in modules(stored.layer.name, config)
            if settings_of(stored) != settings_of(first)
        }
        # mlx-lm leaves alone what is `false` here, or has no scales.
        plain = [module for name in unquantized for module in modules(name, config)]
        settings = common | own | dict.fromkeys(plain, False)
        return {"config.json": {"quantization": settings, **_older_names(config)}}

    def container(self, config: "transformers.PretrainedConfig") -> Container | None:
        return MixtureFile() if config.model_type in FAMILIES else None


def _older_names(config: "transformers.PretrainedConfig") -> Mapping[str, Any]:
    """The settings that mlx-lm reads only under the names that transformers had before version 5."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    rope = parameters.get("full_attention", parameters)
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = dict(rope)
    if local := parameters.get("sliding_attention"):
        older["rope_local_base_freq"] = local["rope_theta"]
    if hasattr(config, "num_experts"):
        older["num_experts"] = config.num_experts
    return older


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [MlxSerializer]


@hookimpl
def dashq_programs() -> list[Program]:
    return [
        Program(name="mlx", format=MlxSerializer.name, open=open_with_mlx),
        Program(name="mlx-lm", format=MlxSerializer.name, open=open_with_mlx_lm),
    ]
