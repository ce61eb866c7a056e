"""The contract of each kind of strategy as a function that tries it out, and the examples to try it on."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.strategies import DrawFn, SearchStrategy
from jaxtyping import Bool, Float, Int
from pydantic import ValidationError
from torch import Generator, Tensor

from dashq.arithmetic import group_importance, round_to_nearest
from dashq.data import Curvature, Diagonal, Full, Grid, Grouping, Layer, Quantized
from dashq.errors import PlanError
from dashq.linear import DashqLinear
from dashq.plan import meta_quantized
from dashq.strategies import KINDS, Estimator, Grouper, Router, Serializer, Solver, Strategy

S = TypeVar("S", bound=Strategy)
E = TypeVar("E")

ALL_BITS = range(1, 9)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Numbers of columns to offer a grouper, which may refuse some of them: odd ones, and those of real models.
WIDTHS = (64, 1, 7, 70, 96, 128, 256, 576, 1024, 4096)
# Layouts of 256 columns of which a serializer has to hold at least one.
PLAIN_SIZES = (32, 64, 128, 256)

# How noise becomes weights and importances. The simplest comes first: it is what a failing example shrinks to.
WEIGHT_KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "heavy-tailed": lambda x: x * (x.square() / 6).exp(),  # tails like those of Student's t, 3 degrees of freedom
    "constant": lambda x: x[:, :1].expand_as(x).clone(),
    "constant in places": lambda x: torch.cat([x[:, :1].expand_as(x)[:, ::2], x[:, 1::2]], dim=1),
    "far from zero": lambda x: 100 + x / 100,
    "tiny": lambda x: 1e-6 * x,
}
IMPORTANCE_KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.ones_like,
    "log-normal": lambda x: (2 * x).exp(),
    "spiky": lambda x: torch.where(x == x.max(), 1e6, 1.0),
    "zero in places": lambda x: x.clamp_min(0),
    "zero": torch.zeros_like,
}
_SEEDS = st.integers(0, 2**16)


def weights(rows: int, columns: int) -> SearchStrategy[Float[Tensor, "rows columns"]]:
    """Weights of every kind in `WEIGHT_KINDS`."""
    kinds = st.sampled_from(list(WEIGHT_KINDS.values()))
    return st.builds(lambda kind, seed: kind(_noise(seed, rows, columns)), kinds, _SEEDS)


def importances(columns: int) -> SearchStrategy[Float[Tensor, " columns"]]:
    """Importances of every kind in `IMPORTANCE_KINDS`."""
    kinds = st.sampled_from(list(IMPORTANCE_KINDS.values()))
    return st.builds(lambda kind, seed: kind(_noise(seed, columns)), kinds, _SEEDS)


def curvatures(columns: int, needs: type[Curvature] = Curvature) -> SearchStrategy[Curvature]:
    """Curvatures that are a `needs`: diagonal ones, and full ones of low rank. Raises ValueError for other types."""
    diagonal = importances(columns)
    full = st.builds(lambda h, seed: _second_moment(_noise(seed, 8, columns) * h.sqrt()), diagonal, _SEEDS)
    known: Mapping[type[Curvature], SearchStrategy[Curvature]] = {
        Diagonal: st.builds(Diagonal, diagonal),
        Full: st.builds(Full, full),
    }
    fitting = [examples for kind, examples in known.items() if issubclass(kind, needs)]
    if not fitting:
        raise ValueError(f"dashq.testing has examples of Diagonal and Full curvature, not of {needs.__name__}")
    return st.one_of(fitting)


@st.composite
def groupings(draw: DrawFn, columns: int) -> Grouping:
    """Groups of any size up to the whole channel, the last one often short, the columns in any order."""
    size = draw(st.sampled_from([columns, 1]) | st.integers(1, columns))
    seed = draw(st.none() | _SEEDS)
    order = None if seed is None else torch.randperm(columns, generator=_generator(seed))
    return Grouping(columns=columns, size=size, order=order)


def grids() -> SearchStrategy[Grid]:
    """Grids of 1 to 8 bits in every type that scales are stored in."""
    return st.builds(Grid, bits=st.sampled_from([2, *ALL_BITS]), dtype=st.sampled_from(DTYPES))


def check_strategy(strategy: type[Strategy] | Strategy) -> None:
    """Check a strategy of any kind, given as a class, which is tried with its defaults, or as an instance.

    Raises AssertionError with the strategy, the law that it breaks, and the shape of an example.
    """
    cls = strategy if isinstance(strategy, type) else type(strategy)
    for kind, check in _CHECKS.items():
        if issubclass(cls, kind):
            check(strategy)


def check_estimator(estimator: type[Estimator] | Estimator) -> None:
    """An estimator does not care how tokens are batched, merges, and counts a token as often as it weighs."""
    tried = _instance(estimator)

    def laws(seen: _Seen) -> None:
        x, counts, cut = seen.inputs, seen.counts, seen.cut
        before = copy.deepcopy(seen)
        all_tokens = (x, counts.float())
        first, second = (x[:cut], counts[:cut].float()), (x[cut:], counts[cut:].float())
        repeated = x.repeat_interleave(counts, dim=0)

        learned, nothing = tried.finish(_fold(tried, x, all_tokens)), tried.finish(_fold(tried, x))
        _require(_equal(seen, before), "leaves its inputs as they are")
        for curvature in (learned, nothing):
            _require(isinstance(curvature, tried.produces), f"produces {tried.produces.__name__} curvature")
            h = curvature.diagonal()
            _require(h.shape == x.shape[1:], "gives its diagonal one entry for each column")
            valid = bool((h.isfinite() & (h >= 0)).all())
            _require(valid, "keeps its diagonal finite and at least zero, even before it saw a token")
        batched = tried.finish(_fold(tried, x, first, second))
        _require(_close(batched, learned), "does not depend on how tokens are cut into batches")
        merged = tried.finish(tried.merge(_fold(tried, x, first), _fold(tried, x, second)))
        _require(_close(merged, learned), "merges two states into what one pass over all tokens gives")
        one_by_one = tried.finish(_fold(tried, x, (repeated, torch.ones(len(repeated)))))
        _require(_close(one_by_one, learned), "counts a token of weight k like k tokens")

    _try(tried, _seen(), laws)


def check_solver(solver: type[Solver] | Solver) -> None:
    """A solver stays inside its grid, never loses to min-max rounding, and is a pure function."""
    tried = _instance(solver)

    def laws(problem: _Problem) -> None:
        weight, curvature, grouping, grid = problem.weight, problem.curvature, problem.grouping, problem.grid
        before = copy.deepcopy(problem)
        result = tried.solve(weight, curvature, grouping, grid)
        _require(_equal(problem, before), "leaves its inputs as they are")
        _require(_equal(result.grouping, grouping) and result.grid == grid, "keeps the grouping and grid it was given")
        shape = (len(weight), grouping.groups, grouping.size)
        codes = result.codes
        _require(codes.dtype == torch.uint8 and codes.shape == shape, "gives codes as uint8 [rows, groups, size]")
        _require(int(codes.max()) <= grid.top, f"keeps its codes within 0 and the grid's top, here {grid.top}")
        for values in (result.scale, result.offset):
            _require(values.shape == shape[:2], "gives scale and offset as [rows, groups]")
            _require(values.dtype == grid.dtype, f"gives scale and offset the grid's type, here {grid.dtype}")
            _require(bool(values.isfinite().all()), "keeps scale and offset finite")
        _require(bool((result.scale > 0).all()), "keeps every scale above zero")
        _require(_equal(tried.solve(weight, curvature, grouping, grid), result), "gives the same result twice")
        minmax = round_to_nearest(grouping.split(weight), grid, grouping)
        # What float32 cannot tell apart at the size of a weight is no loss.
        slack = 4 * torch.finfo(torch.float32).eps * grouping.split(weight).abs().amax(-1)
        lost = _error(result, problem) > _error(minmax, problem) * (1 + 5e-5) + slack
        _require(not lost.any(), "never has more weighted error in a row's group than min-max rounding")

    with _naming(tried):
        problems = _problems(tried.needs)
    _try(tried, problems, laws)


def check_grouper(grouper: type[Grouper] | Grouper) -> None:
    """A grouper says beforehand how large its groups are, and puts every column into exactly one of them."""
    tried = _instance(grouper)
    with _naming(tried):
        accepted = [columns for columns in WIDTHS if _allows(tried.size_for, columns)]
        _require(bool(accepted), f"accepts at least one of {', '.join(map(str, WIDTHS))} columns")

    def laws(problem: _Problem) -> None:
        before = copy.deepcopy(problem)
        columns = problem.weight.shape[1]
        grouping = tried.group(problem.weight, problem.curvature)
        _require(_equal(problem, before), "leaves its inputs as they are")
        _require(grouping.size == tried.size_for(columns), "makes groups of the size that `size_for` tells")
        each = torch.arange(columns)
        covered = grouping.columns == columns and grouping.join(grouping.split(each)).equal(each)
        _require(covered, "puts every column into exactly one group")

    _try(tried, st.sampled_from(accepted).flatmap(lambda columns: _problems(Curvature, columns)), laws)


def check_router(router: type[Router] | Router) -> None:
    """A router gives every token a finite weight of at least zero for every expert."""
    tried = _instance(router)

    def laws(gate: _Gate) -> None:
        before = copy.deepcopy(gate)
        result = tried.token_weights(gate.probabilities, gate.chosen)
        _require(_equal(gate, before), "leaves its inputs as they are")
        _require(result.shape == gate.probabilities.shape, "gives weights as [tokens, experts]")
        _require(bool((result.isfinite() & (result >= 0)).all()), "keeps its weights finite and at least zero")

    _try(tried, _gates(), laws)


def check_serializer(serializer: type[Serializer] | Serializer) -> None:
    """A serializer gives back what it packed bit by bit, and refuses with `PlanError` what it cannot hold.

    It may refuse bits in `grid`, and on the meta device, where a plan is made, the layout of a layer in `pack`.
    """
    tried = _instance(serializer)
    with _naming(tried):
        _require(not any(_allows(tried.grid, bits) for bits in (0, 9)), "refuses 0 and 9 bits with a PlanError")
        accepted = [tried.grid(bits) for bits in ALL_BITS if _allows(tried.grid, bits)]
        plain = [meta_quantized(2, 256, size, grid) for size in PLAIN_SIZES for grid in accepted]
        holds_some = any(_allows(tried.pack, planned) for planned in plain)
        _require(holds_some, f"holds 256 columns at 1 to 8 bits in groups of one of the sizes {PLAIN_SIZES}")

    def laws(q: Quantized) -> None:
        rows, columns, size, ordered = len(q.codes), q.grouping.columns, q.grouping.size, q.grouping.order is not None
        planned = meta_quantized(rows, columns, size, q.grid, ordered)
        if not _allows(tried.pack, planned):
            return
        tensors = tried.pack(q)
        _require(_same(tried.unpack(tensors, columns, size, q.grid), q), "unpacks what it packed, bit by bit")
        agrees = _layout(tried.pack(planned)) == _layout(tensors)
        _require(agrees, "packs a layer on the meta device into tensors of the same names, shapes and types")
        linear = DashqLinear(tried, rows, columns, size, q.grid, ordered, bias=False)
        linear.load_state_dict(dict(tensors))
        _require(_same(linear.quantized(), q), "gives its tensors names that a linear layer can hold them by")

    _try(tried, st.sampled_from(accepted).flatmap(_quantized), laws)


_CHECKS: Mapping[type[Strategy], Callable[[Any], None]] = {
    Estimator: check_estimator,
    Solver: check_solver,
    Grouper: check_grouper,
    Router: check_router,
    Serializer: check_serializer,
}


@dataclass(frozen=True, eq=False)
class _Seen:
    """Layer inputs, how often each token counts, and where to cut them in two."""

    inputs: Float[Tensor, "tokens columns"]
    counts: Int[Tensor, " tokens"]
    cut: int


@dataclass(frozen=True, eq=False)
class _Problem:
    """What a solver is given."""

    weight: Float[Tensor, "rows columns"]
    curvature: Curvature
    grouping: Grouping
    grid: Grid


@dataclass(frozen=True, eq=False)
class _Gate:
    """What a router is given."""

    probabilities: Float[Tensor, "tokens experts"]
    chosen: Bool[Tensor, "tokens experts"]


@st.composite
def _seen(draw: DrawFn) -> _Seen:
    tokens, columns = draw(st.integers(0, 12)), draw(st.integers(1, 40))
    counts = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)), dtype=torch.int64)
    return _Seen(draw(weights(tokens, columns)), counts, draw(st.integers(0, tokens)))


@st.composite
def _problems(draw: DrawFn, needs: type[Curvature], columns: int | None = None) -> _Problem:
    rows, columns = draw(st.integers(1, 4)), columns or draw(st.integers(1, 96))
    curvature = draw(curvatures(columns, needs))
    return _Problem(draw(weights(rows, columns)), curvature, draw(groupings(columns)), draw(grids()))


@st.composite
def _gates(draw: DrawFn) -> _Gate:
    tokens, experts = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    probabilities = (3 * _noise(draw(_SEEDS), tokens, experts)).softmax(-1)
    best = probabilities.topk(draw(st.integers(1, experts))).indices
    return _Gate(probabilities, torch.zeros_like(probabilities, dtype=torch.bool).scatter(1, best, True))


@st.composite
def _quantized(draw: DrawFn, grid: Grid) -> Quantized:
    rows, columns = draw(st.integers(1, 4)), draw(st.sampled_from([256]) | st.integers(1, 96))
    grouping = draw(st.sampled_from([Grouping(columns=columns, size=size) for size in PLAIN_SIZES]) | groupings(columns))
    seed = draw(_SEEDS)
    shape = (rows, grouping.groups, grouping.size)
    return Quantized(
        codes=torch.randint(grid.top + 1, shape, dtype=torch.uint8, generator=_generator(seed)),
        scale=(_noise(seed, *shape[:2]).abs() + 0.01).to(grid.dtype),
        offset=_noise(seed + 1, *shape[:2]).to(grid.dtype),
        grouping=grouping,
        grid=grid,
    )
