"""Hypothesis strategies for what flows between dashq's strategies, from ordinary to degenerate."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from jaxtyping import Bool, Float, Int, UInt8
from torch import Generator, Tensor, nn

from dashq.curvature import Coupled, Curvature, Diagonal, Full
from dashq.data import Codebook, Grid, Grouping, Quantized, SuperBlocks, Tunable, Zero

# How noise becomes weights and importances. The ordinary comes first: it is what a failing example shrinks to.
WEIGHT_KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "heavy-tailed": lambda x: x * (x.square() / 6).exp(),  # tails like those of Student's t, 3 degrees of freedom
    "constant": lambda x: x[:, :1].expand_as(x).clone(),
    "constant in one half": lambda x: torch.where(torch.arange(x.shape[1]) < x.shape[1] // 2, x[:, :1], x),
    "far from zero": lambda x: 100 + x / 100,
    "tiny": lambda x: 1e-6 * x,
}
IMPORTANCE_KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.ones_like,
    "log-normal": lambda x: (2 * x).exp(),
    "spiky": lambda x: torch.where(x == x.max(), 1e6, 1.0),
    "partly zero": lambda x: x.clamp_min(0),
    "wholly zero": torch.zeros_like,
}
_SEEDS = st.integers(0, 2**16)


def _codebook_grid(levels: tuple[float, ...], patterns: int, width: int, super_blocks: SuperBlocks) -> Grid:
    """A grid with so many random `patterns` of positive levels with signs, or with each level alone where it is 0."""
    upper = torch.randint(len(levels) // 2, len(levels), (patterns, width), generator=Generator().manual_seed(0))
    codes = upper if patterns else torch.arange(len(levels))
    codebook = Codebook(
        levels=levels, patterns=codes.to(torch.uint8).numpy().tobytes(), width=width, signs=bool(patterns)
    )
    return Grid(
        bits=3,
        dtype=torch.float32,
        zero="symmetric",
        negative_scales=super_blocks.signed,
        super_blocks=super_blocks,
        codebook=codebook,
    )


# Patterns of eight and of four columns, a single pattern, and levels of which every weight has its own, in one group
# alone too.
CODEBOOK_GRIDS = (
    _codebook_grid((-5.5, -3.125, -1.0, 1.0, 3.125, 5.5), 60, 8, SuperBlocks(groups=2, size=16, top=31, odd=True)),
    _codebook_grid((-3.0, -1.0, 1.0, 3.0), 10, 4, SuperBlocks(groups=8, size=8, top=15, odd=True)),
    _codebook_grid((-2.0, -1.0, 1.0, 2.0), 1, 4, SuperBlocks(groups=2, size=8, top=31, odd=True)),
    _codebook_grid((-9.0, -5.0, -2.0, 0.0, 1.0, 3.0, 6.0), 0, 1, SuperBlocks(groups=8, size=16, top=31, signed=True)),
    _codebook_grid((-9.0, -5.0, -2.0, 0.0, 1.0, 3.0, 6.0), 0, 1, SuperBlocks(groups=1, size=32, top=1, signed=True)),
)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The input of an estimator: layer inputs, how often each token counts, and where to cut them in two."""

    inputs: Float[Tensor, "tokens columns"]
    counts: Float[Tensor, " tokens"]
    cut: int


@dataclass(frozen=True, eq=False)
class LowRank(Coupled):
    """A diagonal and a few directions besides: H = diag(importance) + FᵀF, a curvature that is neither default kind."""

    importance: Float[Tensor, " columns"]
    directions: Float[Tensor, "rank columns"]

    def dense(self) -> Float[Tensor, "columns columns"]:
        return torch.diag(self.importance) + self.directions.T @ self.directions


@dataclass(frozen=True, eq=False)
class Problem:
    """The arguments of a solver; a grouper is given the first two."""

    weight: Float[Tensor, "rows columns"]
    curvature: Curvature
    grouping: Grouping
    grid: Grid


@dataclass(frozen=True, eq=False)
class GateOutput:
    """The arguments of a router."""

    probabilities: Float[Tensor, "tokens experts"]
    chosen: Bool[Tensor, "tokens experts"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """The arguments of a tuner's loss, and the token to cut them at."""

    original: Float[Tensor, "tokens words"]
    quantized: Float[Tensor, "tokens words"]
    next_tokens: Int[Tensor, " tokens"]
    cut: int


def weights(rows: int, columns: int) -> SearchStrategy[Float[Tensor, "rows columns"]]:
    """Weights of every kind in `WEIGHT_KINDS`."""
    kinds = st.sampled_from(list(WEIGHT_KINDS.values()))
    return st.builds(lambda kind, seed: kind(_noise(seed, rows, columns)), kinds, _SEEDS)


def importances(columns: int) -> SearchStrategy[Float[Tensor, " columns"]]:
    """Importances of every kind in `IMPORTANCE_KINDS`."""
    kinds = st.sampled_from(list(IMPORTANCE_KINDS.values()))
    return st.builds(lambda kind, seed: kind(_noise(seed, columns)), kinds, _SEEDS)


def curvatures(columns: int, needs: type[Curvature] = Curvature) -> SearchStrategy[Curvature]:
    """Diagonal curvatures, full ones of rank 8, and those of a plugin's own kind, as far as they are a `needs`.

    Raises ValueError where none is.
    """
    diagonal = importances(columns)
    full = st.builds(lambda h, seed: _second_moment(_noise(seed, 8, columns) * h.sqrt()), diagonal, _SEEDS)
    examples: Mapping[type[Curvature], SearchStrategy[Curvature]] = {
        Diagonal: st.builds(Diagonal, diagonal),
        Full: full,
        LowRank: st.builds(lambda h, seed: LowRank(h, _noise(seed, 2, columns) * h.sqrt()), diagonal, _SEEDS),
    }
    fitting = [values for kind, values in examples.items() if issubclass(kind, needs)]
    if not fitting:
        raise ValueError(f"there are examples of Diagonal and Full curvature, but not of {needs.__name__}")
    return st.one_of(fitting)


@st.composite
def groupings(draw: DrawFn, columns: int) -> Grouping:
    """Groups of any size up to the whole channel, the last one often short, the columns in any order."""
    size = draw(st.just(columns) | st.integers(1, columns))
    seed = draw(st.none() | _SEEDS)
    order = None if seed is None else torch.randperm(columns, generator=_generator(seed))
    return Grouping(columns=columns, size=size, order=order)


def grids(zeros: Sequence[Zero] = ("real", "integer", "symmetric")) -> SearchStrategy[Grid]:
    """Grids of 1 to 8 bits with every kind of zero, in every type that scales are stored in."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    plain = {"bits": st.integers(1, 8), "dtype": st.sampled_from(dtypes)}
    kinds = [st.builds(Grid, **plain, zero=st.just(zero)) for zero in zeros]
    if "symmetric" in zeros:
        kinds.append(st.builds(Grid, **plain, zero=st.just("symmetric"), negative_scales=st.just(True)))
    return st.one_of(kinds)


@st.composite
def tokens(draw: DrawFn, chunk_tokens: int = 1) -> TokenBatch:
    """A few times `chunk_tokens` tokens, or none, to be cut at a multiple of `chunk_tokens`."""
    count, columns = draw(st.integers(0, 12)), draw(st.integers(1, 40))
    times = torch.randint(4, (count * chunk_tokens,), generator=_generator(draw(_SEEDS))).float()
    return TokenBatch(draw(weights(count * chunk_tokens, columns)), times, chunk_tokens * draw(st.integers(0, count)))


@st.composite
def problems(draw: DrawFn, columns: int | None = None, needs: type[Curvature] = Curvature) -> Problem:
    """A few rows of `columns`, or of up to 96 columns, with a curvature that is a `needs`."""
    rows, columns = draw(st.integers(1, 4)), columns or draw(st.integers(1, 96))
    curvature = draw(curvatures(columns, needs))
    return Problem(draw(weights(rows, columns)), curvature, draw(groupings(columns)), draw(grids()))


@st.composite
def block_grids(draw: DrawFn) -> Grid:
    """Grids of 2 to 5 bits with super-blocks of some groups, whose multiples have 3 to 6 bits."""
    signed = draw(st.booleans())
    groups, size = draw(st.sampled_from([8, 16, 2])), draw(st.sampled_from([16, 32, 8]))
    super_blocks = SuperBlocks(groups=groups, size=size, top=draw(st.sampled_from([15, 31, 63, 7])), signed=signed)
    zero: Zero = "symmetric" if signed else "real"
    bits = draw(st.integers(2, 5))
    return Grid(bits=bits, dtype=torch.float32, zero=zero, negative_scales=signed, super_blocks=super_blocks)


@st.composite
def block_problems(draw: DrawFn, needs: type[Curvature] = Curvature, codebooks: bool = False) -> Problem:
    """A few rows of one or two super-blocks; of grids with `codebooks`, where these are wanted."""
    grid = draw(st.sampled_from(CODEBOOK_GRIDS) if codebooks else block_grids())
    assert grid.super_blocks
    rows, columns = draw(st.integers(1, 4)), grid.super_blocks.columns * draw(st.integers(1, 2))
    grouping = Grouping(columns=columns, size=grid.super_blocks.size)
    return Problem(draw(weights(rows, columns)), draw(curvatures(columns, needs)), grouping, grid)


@st.composite
def gates(draw: DrawFn) -> GateOutput:
    """The output of a gate that chose at least one expert for each token."""
    count, experts = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    probabilities = (3 * _noise(draw(_SEEDS), count, experts)).softmax(-1)
    best = probabilities.topk(draw(st.integers(1, experts))).indices
    return GateOutput(probabilities, torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, best, True))


@st.composite
def predictions(draw: DrawFn) -> Predictions:
    """Logits of both models for up to eight tokens: ordinary, large, all alike, or the same in both."""
    tokens, words, seed = draw(st.integers(1, 8)), draw(st.integers(2, 40)), draw(_SEEDS)
    original, change = draw(st.sampled_from([3.0, 0.0, 30.0])) * _noise(seed, 2, tokens, words)
    quantized = original + draw(st.sampled_from([0.1, 0.0, 1.0])) * change
    following = torch.randint(words, (tokens,), generator=_generator(seed))
    return Predictions(original, quantized, following, draw(st.integers(0, tokens)))


def tunables(device: str = "cpu") -> list[Tunable]:
    """Every kind of change in a small model of two layers, one norm for each, all 0 as before the first step."""
    shapes: Mapping[Literal["scale", "offset", "norm"], tuple[int, ...]] = {
        "scale": (4, 3),
        "offset": (4, 3),
        "norm": (6,),
    }
    return [
        Tunable(kind, f"layers.{layer}.{kind}", nn.Parameter(torch.zeros(shape, device=device)))
        for layer in range(2)
        for kind, shape in shapes.items()
    ]


@st.composite
def quantized_layers(draw: DrawFn, grid: Grid) -> Quantized:
    """Any codes, scales and offsets that lie in the grid, half of them in groups that every format knows."""
    plain = st.builds(Grouping, columns=st.just(256), size=st.sampled_from([16, 32, 64, 128]))
    if grid.super_blocks:
        grouping = Grouping(columns=2 * grid.super_blocks.columns, size=grid.super_blocks.size)
    else:
        grouping = draw(plain | st.integers(1, 96).flatmap(groupings))
    rows, seed = draw(st.integers(1, 4) | st.just(32)), draw(_SEEDS)
    codes = _codes(grid, (rows, grouping.groups, grouping.size), seed)
    scale, offset = _parameters(grid, rows, grouping.groups, seed)
    return Quantized(codes=codes, scale=scale, offset=offset, grouping=grouping, grid=grid)


def _codes(grid: Grid, shape: tuple[int, int, int], seed: int) -> UInt8[Tensor, "rows groups size"]:
    """Any codes of a grid, or patterns of its codebook."""
    codebook, generator = grid.codebook, _generator(seed)
    if not codebook:
        return torch.randint(grid.top + 1, shape, dtype=torch.uint8, generator=generator)
    entries = codebook.entries(torch.device("cpu"))
    patterns = torch.randint(len(entries), (*shape[:2], shape[2] // codebook.width), generator=generator)
    levels = entries[patterns].flatten(2)
    signs = torch.randint(2, shape, generator=generator) if codebook.signs else torch.zeros(shape)
    return codebook.codes(torch.where(signs == 1, -levels, levels))


def _parameters(grid: Grid, rows: int, groups: int, seed: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets [rows groups] of a grid."""
    scale, number = _noise(seed, 2, rows, groups).to(grid.dtype)
    scale = scale.abs() + 0.01
    if grid.super_blocks:
        return _products(grid, rows, groups, seed)
    if grid.zero == "real":
        return scale, -scale.float() * number.float() if grid.stores_zero else number
    zero = torch.randint(grid.top + 1, (rows, groups), generator=_generator(seed))
    return scale, -scale.float() * (grid.middle if grid.zero == "symmetric" else zero)


def _products(grid: Grid, rows: int, groups: int, seed: int) -> tuple[Tensor, Tensor]:
    """Float16 units times whole numbers, for each super-block."""
    blocks = grid.super_blocks
    assert blocks
    shape, generator = (rows, groups // blocks.groups, blocks.groups), _generator(seed)
    units = (_noise(seed, 2, *shape[:2], 1).abs() + 0.01).half().float()
    multiples = blocks.multiples
    scale = (units[0] * multiples[torch.randint(len(multiples), shape, generator=generator)]).flatten(1)
    if not blocks.has_offsets:
        return scale, -scale * grid.middle
    return scale, -(units[1] * torch.randint(blocks.top + 1, shape, generator=generator)).flatten(1)


def _second_moment(x: Float[Tensor, "tokens columns"]) -> Full:
    return Full(x.T @ x / len(x))


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(seed))


def _generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)
