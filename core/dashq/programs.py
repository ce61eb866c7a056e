"""Programs that open checkpoints without dashq: for `dashq verify` to compare with, and as targets of new recipes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.data import Layer
from dashq.strategies import Serializer

Level = Literal["fast", "usual", "best"]
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, eq=False, kw_only=True)
class Opened:
    """A checkpoint as another program opened it.

    `weight` returns the [rows, columns] that the program computes with in the layer of a name, `logits` the [tokens,
    vocabulary] for token ids; None where the program does not give them. Differences from what dashq reads may be as
    large as `tolerance` times the largest weight, and `logits_tolerance` times the largest logit. dashq computes its
    logits with weights rounded to `unpacks_to`, the type that the program unpacks to. `computes_in` is the type that
    the program computes logits in; `rounded` rounds the inputs of the layer of a name as the program does before it
    multiplies. Each of these two that is given allows three times the change that it makes to dashq's own logits.
    """

    weight: Callable[[str], Float[Tensor, "rows columns"]] | None = None
    logits: Callable[[list[int]], Float[Tensor, "tokens vocabulary"]] | None = None
    rounded: Callable[[str, Float[Tensor, "*tokens columns"]], Float[Tensor, "*tokens columns"]] | None = None
    computes_in: torch.dtype = torch.float32
    unpacks_to: torch.dtype = torch.float32
    tolerance: float = 0.0
    logits_tolerance: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program that opens the checkpoints of one format, under the `name` that `dashq verify --with` takes.

    `format` is the serializer's name; a format can have programs from several plugins. `open` is called once for each
    comparison, on the CPU, with the folder of a finished checkpoint, and True where code that lies in that folder is
    trusted; nothing else there may run. An `ImportError` from it says that the program is not installed here, any other
    exception that the program does not open the checkpoint.
    """

    name: str
    format: str
    open: Callable[[Path, bool], Opened]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Somebody's wish for a model, before there is a recipe.

    A whole number of `bits` stands for that of the codes; any other is the most that a weight may take on average,
    scales and offsets included. `text` is a source to calibrate on, as recipes have it, in samples of no more tokens
    than `sequence_length`. `layers` are all in blocks that could be quantized, `outside` embeddings and head, or the
    one matrix that is both.
    """

    model: str
    output: Path
    bits: float
    level: Level
    text: str
    sequence_length: int
    layers: Sequence[Layer]
    outside: Sequence[Layer] = ()


@dataclass(frozen=True, kw_only=True)
class Target:
    """A program that people use results in, under the `name` that `dashq init --for` takes.

    `recipe` returns a recipe in YAML with comments that say why, or raises `UsageError` with what the program can have.
    `suits` is true for the serializers whose results are made for the program. Runs with one of these end with the
    `command` that starts the result there, with `{output}` in place of its folder.
    """

    name: str
    recipe: Callable[[Wish], str]
    suits: Callable[[Serializer], bool]
    command: str
