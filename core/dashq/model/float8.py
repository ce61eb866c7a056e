"""Float8 weights with scales beside them, read as the values that both stand for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dashq.device import type_name
from dashq.errors import CheckpointError, refusing
from dashq.model.source import Header, Source

if TYPE_CHECKING:
    import transformers

KINDS = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("_scale_inv", "_scale")  # endings of a scale's name behind its weight's; both are factors
# Endings of tensors that say how layers' inputs are rounded while the model runs: no part of the weights.
INPUTS = ("input_scale", "input_scale_ub", "activation_scale")
SETTINGS = ("quantization_config", "compression_config")
WAY_OUT = "take the model that it was made from, or save its weights dequantized in bfloat16 first"


@dataclass(frozen=True)
class ScaledTensor:
    """The handle of a float8 weight, multiplied with its scale when it is indexed with `[...]`.

    With a `block` of [rows, columns] each scale is for a part of the weight of this size, those at its ends may be
    smaller; else one scale is for all, or for a whole row.
    """

    weight: Any
    scale: Any
    block: tuple[int, int] | None

    def __getitem__(self, index: Any) -> Float[Tensor, "..."]:
        return scaled(self.weight[index], self.scale[index], self.block)


def scaled(
    weight: Float[Tensor, "*stack rows columns"], scale: Shaped[Tensor, "..."], block: tuple[int, int] | None
) -> Float[Tensor, "*stack rows columns"]:
    """The weight times its scales, in float32."""
    factors = scale.float()
    if factors.numel() == 1:
        factors = factors.reshape(())
    elif block:
        rows, columns = weight.shape[-2:]
        factors = factors.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :rows, :columns]
    return weight.float().mul_(factors)


class Float8(Source):
    """Another source whose float8 weights have scales, for the blocks that the configuration names if there are any.

    What has no scale is left as it is. Raises a `CheckpointError` for scales of other types and shapes.
    """

    def __init__(self, source: Source, block: tuple[int, int] | None, place: str, dtype: str) -> None:
        self._source, self._dtype = source, dtype
        headers = source.headers()
        self._scales = {
            key: next(key + end for end in SCALES if key + end in headers)
            for key, header in headers.items()
            if header.dtype in KINDS and any(key + end in headers for end in SCALES)
        }
        self._blocks = {
            key: _block(f"{place}: {scale}", headers[key].shape, headers[scale], block)
            for key, scale in self._scales.items()
        }
        apart = {*self._scales.values(), *(key for key in headers if key.endswith(INPUTS))}
        # The values' type is the model's, as of all that has to be unpacked first.
        self._headers = {
            key: Header(header.shape, None) if key in self._scales else header
            for key, header in headers.items()
            if key not in apart
        }

    @property
    def notes(self) -> Iterable[str]:
        if count := len(self._scales):
            yield f"{count} float8 weights are multiplied with their scales and read as {self._dtype}"

    def headers(self) -> Mapping[str, Header]:
        return self._headers

    def lazy(self, keys: list[str]) -> Mapping[str, Any]:
        scaled_keys = [key for key in keys if key in self._scales]
        handles = self._source.lazy([*keys, *(self._scales[key] for key in scaled_keys)])
        tensors = {
            key: ScaledTensor(handles[key], handles[self._scales[key]], self._blocks[key]) for key in scaled_keys
        }
        return {key: tensors.get(key, handles[key]) for key in keys}

    def conversions(self, network: "transformers.PreTrainedModel") -> list[Any]:
        return self._source.conversions(network)


def float8_blocks(settings: Any, place: str) -> tuple[int, int] | None:
    """The size of the blocks that share a scale, from the `quantization_config` of a float8 model; None without blocks.

    Raises a `CheckpointError` for models quantized in any other way.
    """
    entries = settings if isinstance(settings, Mapping) else {}
    method, form = entries.get("quant_method", "an unknown method"), entries.get("format")
    if method == "fp8":
        return _size(entries.get("weight_block_size", [128, 128]), place)
    if method == "fbgemm_fp8":
        return None
    if form == "float-quantized":
        with refusing(f"{place} has settings of quantized weights that cannot be read"):
            return _grouped(entries, place)
    named = f"{method}, {form}" if form else method
    raise CheckpointError(
        f"{place} is already quantized ({named}); dashq needs the original weights, or float8 ones with scales of a "
        f"kind that it knows (fp8, fbgemm_fp8, float-quantized): {WAY_OUT}"
    )


def _grouped(entries: Mapping[str, Any], place: str) -> tuple[int, int] | None:
    """The size of blocks where the configuration has groups of layers, each with settings of its own."""
    groups = entries.get("config_groups")
    rules = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
    for rule in rules:
        if rule and (rule.get("type"), rule.get("num_bits"), rule.get("symmetric", True)) != ("float", 8, True):
            raise CheckpointError(f"{place}: weights of {rule.get('num_bits')} bits cannot be read: {WAY_OUT}")
    blocks = {
        _size(rule.get("block_structure"), place) if rule.get("strategy") == "block" else (1, int(rule["group_size"]))
        for rule in rules
        if rule.get("strategy") in ("block", "group")
    }
    if (transform := (entries.get("transform_config") or {}).get("config_groups")) or len(blocks) > 1:
        why = "turned weights" if transform else f"scales for blocks of several sizes, {sorted(map(str, blocks))},"
        raise CheckpointError(f"{place}: {why} cannot be read: {WAY_OUT}")
    if (sparsity := (entries.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise CheckpointError(f"{place}: sparse weights ({sparsity}) cannot be read: {WAY_OUT}")
    return blocks.pop() if blocks else None


def _size(block: Any, place: str) -> tuple[int, int] | None:
    if block is None:
        return None
    if isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
        return block[0], block[1]
    raise CheckpointError(f"{place}: blocks of {block} cannot be read: two numbers above 0 are needed, as [128, 128]")


def _block(place: str, shape: tuple[int, ...], scale: Header, block: tuple[int, int] | None) -> tuple[int, int] | None:
    """The block that one scale is for, None where the scales multiply the weight as they are."""
    if not (scale.dtype and scale.dtype.is_floating_point):
        kind = type_name(scale.dtype) if scale.dtype else "unknown"
        raise CheckpointError(f"{place} is of type {kind} where a scale is a floating-point number: {WAY_OUT}")
    if block and len(shape) > 1:
        grid = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        if scale.shape == grid:
            return block
    one = all(size == 1 for size in scale.shape)
    along = len(scale.shape) == len(shape) and all(a in (1, b) for a, b in zip(scale.shape, shape, strict=True))
    if one or along:
        return None
    raise CheckpointError(
        f"{place} has shape {list(scale.shape)}, which is no scale for a weight of shape {list(shape)}: one for all, "
        f"for each row{f', or for each block of {list(block)}' if block else ''} is needed"
    )
