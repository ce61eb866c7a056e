"""What other programs make of a checkpoint, for `dashq verify` to compare."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dashq.data import StoredLayer

ROUNDING = 3.0  # two roundings alike in size are independent of each other: their difference is larger than each


@dataclass(frozen=True, eq=False, kw_only=True)
class Contents:
    """A finished model on disk: handles of its tensors by name, and the folder with its configuration and tokenizer.

    `layers` are the quantized ones by name; their tensors are named after them, as `pack` has them.
    """

    folder: Path
    layers: Mapping[str, StoredLayer]
    tensors: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Opened:
    """A checkpoint as another program opened it.

    `weight` gives the [rows, columns] that the program computes with in a layer by name, None where it does not tell.
    `logits` are of shape [tokens, vocabulary] for token ids. Differences from what dashq reads may be as large as
    `tolerance` times the largest weight, and `logits_tolerance` times the largest logit; ours are of weights rounded to
    the type that the program `unpacks_to`. Where it rounds what it multiplies a layer's weights with, `rounded` does
    the same to the inputs of a layer by name: logits may then differ by `ROUNDING` times as much more as ours change by
    that, and likewise where it computes logits in another type than float32, `computes_in`.
    """

    weight: Callable[[str], Tensor] | None = None
    logits: Callable[[list[int]], Tensor] | None = None
    rounded: Callable[[str, Tensor], Tensor] | None = None
    computes_in: torch.dtype = torch.float32
    unpacks_to: torch.dtype = torch.float32
    tolerance: float = 0.0
    logits_tolerance: float = 1e-3


Program = Callable[[Path], Opened]
