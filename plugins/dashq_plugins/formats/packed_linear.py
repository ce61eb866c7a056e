"""The layout of the checkpoints that the authors of DASH-Q publish, written and read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn import functional

from dashq import CheckpointError, Grid, Grouping, Layer, Quantized, Serializer, StoredLayer, hookimpl
from dashq.model.mappings import read_mapping
from dashq_plugins.formats.words import refuse_bits, refuse_order

if TYPE_CHECKING:
    import transformers

SIDE_FILE = "dashq_config.json"
BITS = (2, 3, 4)


OPENING = """\
from pathlib import Path

import torch
from dashq.results.checkpoint import open_network

model = open_network(Path("{model}"), torch.float32)
"""


class PackedLinearSerializer(Serializer):
    """2, 3 or 4 bits with float16 scales and real zeros, any group size; layers may differ. The DASH-Q authors' layout.

    Load it with their loader, or with `dashq.results.checkpoint.open_network(FOLDER, dtype)`, which reads theirs too.
    """

    name = "dashq-packed-linear"
    library = "dashq"
    openings: ClassVar[Mapping[str, str]] = {"dashq, from a local folder": OPENING}
    holds_experts = False
    files = (SIDE_FILE,)

    def grid(self, bits: int) -> Grid:
        refuse_bits(bits, BITS, self.name)
        return Grid(bits=bits, dtype=torch.float16, stores_zero=True)

    def pack(self, quantized: Quantized) -> Mapping[str, Tensor]:
        q, bits = quantized, quantized.grid.bits
        refuse_order(q, self.name)
        groups = q.scale.numel()
        if q.codes.is_meta:
            words = q.codes.new_empty(-(-q.codes.numel() // (32 // bits)), dtype=torch.int32)
            numbers = q.scale.new_empty(groups, 1)
            return {"W_q_packed": words, "scale": numbers, "zero": numbers.half()}
        codes = q.codes.flatten().int()
        # Each word of 32 bits holds as many whole codes as fit, lowest bits first: 16, 10 (two bits stay empty) or 8.
        words = functional.pad(codes, (0, -len(codes) % (32 // bits))).view(-1, 32 // bits)
        packed = words[:, 0].clone()
        for index in range(1, 32 // bits):
            packed |= words[:, index] << bits * index
        zero = (-q.offset.float() / q.scale.float()).half()
        return {"W_q_packed": packed, "scale": q.scale.reshape(-1, 1), "zero": zero.reshape(-1, 1)}

    def unpack(self, tensors: Mapping[str, Shaped[Tensor, "..."]], columns: int, size: int, grid: Grid) -> Quantized:
        grouping, bits = Grouping(columns=columns, size=size), grid.bits
        scale = tensors["scale"].reshape(-1, grouping.groups)
        shape = (len(scale), grouping.groups, size)
        words = tensors["W_q_packed"][:, None]
        # Values are not checked in a compiled graph, which cannot hang on them.
        if bits == 3 and not torch.compiler.is_compiling() and bool((words >> 30).any()):
            raise ValueError("bits that a word of 3-bit codes leaves empty are set: codes out of range")
        shifts = bits * torch.arange(32 // bits, dtype=torch.int32, device=words.device)
        codes = ((words >> shifts) & grid.top).to(torch.uint8).flatten()[: scale.numel() * size]
        zero = tensors["zero"].reshape(scale.shape)
        return Quantized(
            codes=codes.view(shape),
            scale=scale,
            offset=-scale.float() * zero.float(),
            grouping=grouping,
            grid=grid,
        )

    def describe(
        self, layers: Sequence[StoredLayer], unquantized: Sequence[str], config: "transformers.PretrainedConfig"
    ) -> Mapping[str, Mapping[str, Any]]:
        modules = {}
        for stored in layers:
            grouping = Grouping(columns=stored.layer.columns, size=stored.size)
            modules[stored.layer.name] = {
                "nbits": stored.grid.bits,
                "group_size": stored.size,
                "num_groups": stored.layer.rows * grouping.groups,
                "in_features": stored.layer.columns,
                "quant_in_features": grouping.groups * stored.size,
                "out_features": stored.layer.rows,
                "linear_dtype": "float16",
                "scale_zero_dtype": "float16",
            }
        return {SIDE_FILE: modules}

    @classmethod
    def recognise(cls, folder: Path) -> Sequence[StoredLayer]:
        path = folder / SIDE_FILE
        if not path.is_file():
            return ()
        try:
            content = read_mapping(path)
            entries = {name: entry for name, entry in content.items() if isinstance(entry, dict) and "nbits" in entry}
            return [_stored(name, entry) for name, entry in entries.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} does not describe packed layers: {error!r}") from error


def _stored(name: str, entry: Mapping[str, Any]) -> StoredLayer:
    size, columns = entry["group_size"], entry["in_features"]
    grouping = Grouping(columns=columns, size=size)
    rows, left = divmod(entry["num_groups"], grouping.groups)
    if left or entry["quant_in_features"] != grouping.groups * size:
        raise ValueError(f"{name}: {entry['num_groups']} groups of {size} do not fill rows of {columns}")
    if entry["scale_zero_dtype"].removeprefix("torch.") != "float16":
        raise ValueError(f"{name}: scales and zeros of type {entry['scale_zero_dtype']}, where float16 can be read")
    if entry["nbits"] not in BITS:
        raise ValueError(f"{name}: {entry['nbits']} bits, where {BITS} can be read")
    grid = Grid(bits=entry["nbits"], dtype=torch.float16, stores_zero=True)
    return StoredLayer(layer=Layer(name=name, rows=rows, columns=columns), grid=grid, size=size, ordered=False)


@hookimpl
def dashq_serializers() -> list[type[Serializer]]:
    return [PackedLinearSerializer]
