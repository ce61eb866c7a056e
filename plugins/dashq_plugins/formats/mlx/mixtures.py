"""Mixtures of experts as mlx-lm keeps them: stacks of other names, with gates and what they multiply apart."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from dashq import Container, Contents, PlanError, StoredLayer
from dashq.model.location import Location
from dashq.model.source import SAFETENSORS_DTYPES, WEIGHTS, Shards
from dashq_plugins.formats.words import refuse_uneven_stacks

if TYPE_CHECKING:
    import transformers

PLAIN: Mapping[str, Any] = {"hidden_act": "silu", "rope_type": "default"}
NO_DENSE_BLOCKS: Mapping[str, Any] = {"mlp_only_layers": [], "decoder_sparse_step": 1}
# By model type, what mlx-lm calls `mlp` in a block, and the settings that it takes for granted.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("block_sparse_moe", {**PLAIN, "sliding_window": None}),
    "qwen2_moe": ("mlp", {**PLAIN, "use_sliding_window": False, "norm_topk_prob": False, **NO_DENSE_BLOCKS}),
    "qwen3_moe": ("mlp", {**PLAIN, "sliding_window": None}),
    "olmoe": ("mlp", {"hidden_act": "silu", "clip_qkv": None}),
    "deepseek_v2": ("mlp", {"hidden_act": "silu", "rope_type": "yarn"}),
}
STACK = re.compile(r"(.+)\.mlp\.experts\.(gate_up_proj|down_proj)(?:\.(\d+))?(?:\.(\w+))?")
KEYS = ("weight", "scales", "biases")
TYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()} | {torch.uint32: "U32"}

Named = Iterable[tuple[str, Tensor]]


def place(name: str, config: "transformers.PretrainedConfig") -> tuple[Sequence[str], int | None]:
    """The names that mlx-lm has for a tensor, two where it keeps gates apart, and the expert in a stack."""
    owner, _ = FAMILIES.get(config.model_type, ("mlp", {}))
    match = STACK.fullmatch(name)
    if not match:
        return [name.replace(".mlp.", f".{owner}.")], None
    block, stack, expert, key = match.groups()
    parts = ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,)
    names = [f"{block}.{owner}.switch_mlp.{part}.{key or 'weight'}" for part in parts]
    return names, None if expert is None else int(expert)


def modules(name: str, config: "transformers.PretrainedConfig") -> Sequence[str]:
    """The names that mlx-lm has for a layer."""
    return [tensor.removesuffix(".weight") for tensor in place(f"{name}.weight", config)[0]]


def check_mixture(network: "transformers.PreTrainedModel", layers: Sequence[StoredLayer], format_name: str) -> None:
    """A `PlanError` where mlx-lm would not find the experts, or would compute something else."""
    config = network.config
    experts = [name for name, parameter in network.named_parameters() if parameter.dim() == 3]
    experts += [stored.layer.name for stored in layers if stored.layer.expert is not None]
    if not experts:
        return
    if config.model_type not in FAMILIES:
        raise PlanError(
            f"{experts[0]}: format {format_name} has no names for experts of model type {config.model_type!r}. "
            f"Known: {', '.join(FAMILIES)}"
        )
    for key, value in FAMILIES[config.model_type][1].items():
        if (own := (config.rope_parameters | vars(config)).get(key)) != value:
            raise PlanError(
                f"mlx-lm computes models of type {config.model_type!r} with {key} = {value!r}, and here it is {own!r}"
            )
    refuse_uneven_stacks(network, layers, format_name)


class MixtureFile(Container):
    """All tensors in one file of safetensors, which mlx-lm needs for mixtures: stacks are put together there."""

    file = WEIGHTS

    def write(self, path: Path, contents: Contents) -> None:
        from dashq.model.loading import read_config

        config = read_config(Location.of(contents))
        write_tensors(path, lambda: _in_file(contents.tensors, config))

    def read(self, path: Path, contents: Contents) -> Mapping[str, Any]:
        from dashq.model.loading import network_of, read_config

        location = Location.of(contents)
        config = read_config(location)
        with torch.device("meta"):
            expected = network_of(config, location).state_dict()
        shards = Shards(path.parent)
        handles = shards.lazy(list(shards.headers()))
        stacks = {
            name.rpartition(".")[0] for name, stored in contents.layers.items() if stored.layer.expert is not None
        }
        names = {f"{layer}.{key}" for layer in contents.layers for key in KEYS} | expected.keys() - stacks
        places = {name: place(name, config) for name in sorted(names)}
        return {
            name: MixtureTensor([handles[part] for part in parts], expert)
            for name, (parts, expert) in places.items()
            if all(part in handles for part in parts)
        }


@dataclass(frozen=True, eq=False)
class MixtureTensor:
    """A handle of one of our tensors in a file of mlx-lm's, or of one expert's part of it."""

    parts: Sequence[Any]
    expert: int | None

    def __getitem__(self, index: Any) -> Tensor:
        if self.expert is not None:
            return torch.cat([part[self.expert] for part in self.parts])
        tensors: list[Tensor] = [part[...] for part in self.parts]
        return torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]


def _in_file(tensors: Mapping[str, Any], config: "transformers.PretrainedConfig") -> Iterator[tuple[str, Tensor]]:
    """Every tensor as the file has it; experts that are apart here become stacks."""
    stacks: dict[tuple[str, ...], dict[int, Any]] = defaultdict(dict)
    for name, handle in tensors.items():
        names, expert = place(name, config)
        if expert is None:
            yield from _apart(names, handle[...])
        else:
            stacks[tuple(names)][expert] = handle
    for together, handles in stacks.items():
        yield from _apart(together, torch.stack([handles[expert][...] for expert in sorted(handles)]))


def _apart(names: Sequence[str], tensor: Shaped[Tensor, "..."]) -> Named:
    return zip(names, tensor.chunk(len(names), dim=1) if len(names) > 1 else [tensor], strict=True)


def write_tensors(path: Path, tensors: Callable[[], Named]) -> None:
    """A file of safetensors whose tensors are made twice, so that they need not be in memory together.

    The header comes first, with the place of each tensor; larger types lie first, so that all lie on whole words.
    """
    tensors_in_file = [(name, tensor.dtype, list(tensor.shape), tensor.nbytes) for name, tensor in tensors()]
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, dtype, shape, size in sorted(tensors_in_file, key=lambda entry: -entry[1].itemsize):
        header[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors():
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
