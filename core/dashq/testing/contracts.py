"""The contract of each kind of strategy, as functions that try it on examples."""

import copy
import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy
from jaxtyping import Bool, Float
from torch import Tensor

from dashq.curvature import Diagonal
from dashq.data import Grid, Layer, Quantized, StoredLayer
from dashq.errors import PlanError
from dashq.processes.trees import outline, rebuilt, tensors_of
from dashq.runtime.linear import DashqLinear
from dashq.solving.arithmetic import group_importance, round_to_nearest
from dashq.strategies import Claim, Estimator, Grouper, Router, Serializer, Solver, Strategy, Tuner
from dashq.testing.comparison import close, equal, layout, same
from dashq.testing.curvature import require_laws
from dashq.testing.examples import (
    GateOutput,
    Problem,
    TokenBatch,
    block_problems,
    curvatures,
    gates,
    predictions,
    problems,
    quantized_layers,
    tokens,
)
from dashq.testing.laws import naming, require
from dashq.testing.tuners import require_loss, require_optimizer, require_steps

S = TypeVar("S", bound=Strategy)
E = TypeVar("E")

# Numbers of columns to offer a grouper, which may refuse some of them: odd ones, and those of real models.
WIDTHS = (64, 1, 7, 70, 96, 128, 256, 576, 1024, 2048)
PLAIN_SIZES = (16, 32, 64, 128, 256)
CLAIMS: tuple[Claim, ...] = get_args(Claim)


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

    def laws(batch: TokenBatch) -> None:
        x, counts, cut = batch.inputs, batch.counts, batch.cut
        before = copy.deepcopy(batch)
        layer = Layer(name="example", rows=1, columns=x.shape[1])

        def fold(*batches: tuple[Float[Tensor, "tokens columns"], Float[Tensor, " tokens"]]) -> Any:
            state = tried.start(layer)
            for inputs, token_weight in batches:
                state = tried.update(state, inputs, token_weight)
            return state

        learned = tried.finish(fold((x, counts)))
        require(equal(batch, before), "leave its inputs as they are")
        for curvature in (learned, tried.finish(fold())):
            require(isinstance(curvature, tried.produces), f"produce {tried.produces.__name__} curvature")
            h = curvature.diagonal()
            require(h.shape == x.shape[1:], "give its diagonal one entry for each column")
            valid = bool((h.isfinite() & (h >= 0)).all())
            require(valid, "keep its diagonal finite and at least zero, even before it saw a token")
        require_laws(learned, tried.finish(fold()))
        first, second = (x[:cut], counts[:cut]), (x[cut:], counts[cut:])
        require(close(tried.finish(fold(first, second)), learned), "give the same however tokens are cut into batches")
        merged = tried.finish(tried.merge(fold(first), _sent(fold(second), tried.start(layer))))
        require(close(merged, learned), "merge two states into what one pass over all tokens gives")
        repeated = x.repeat_interleave(counts.long(), dim=0)
        one_by_one = tried.finish(fold((repeated, torch.ones(len(repeated)))))
        if tried.chunk_tokens > 1:  # the copies move others to where they belong together with new neighbours
            one_by_one, learned = Diagonal(one_by_one.diagonal()), Diagonal(learned.diagonal())
        require(close(one_by_one, learned), "count a token of weight k like k tokens")

    with naming(tried):
        sizes = [tried.state_size(columns) for columns in WIDTHS]
        require(all(size > 0 for size in sizes), "say with `state_size` a size above zero")
    _try(tried, tokens(tried.chunk_tokens), laws)


def _sent(state: Any, like: Any) -> Any:
    """A state as it arrives in another process, which has one that is `like` it."""
    return rebuilt(json.loads(json.dumps(outline(state))), like, iter([*tensors_of(state)]))


def check_solver(solver: type[Solver] | Solver) -> None:
    """A solver stays inside its grid, is a pure function, and keeps what it claims."""
    tried = _instance(solver)

    def laws(problem: Problem) -> None:
        weight, curvature, grouping, grid = problem.weight, problem.curvature, problem.grouping, problem.grid
        if not _allows(tried.check, grouping.size, grid):
            return
        before = copy.deepcopy(problem)
        result = tried.solve(weight, curvature, grouping, grid)
        require(equal(problem, before), "leave its inputs as they are")
        require(
            equal(result.grouping, grouping) and result.grid == grid,
            "keep the grouping and the grid that it was given",
        )
        shape = (len(weight), grouping.groups, grouping.size)
        is_code = result.codes.dtype == torch.uint8 and result.codes.shape == shape
        require(is_code, "give codes as uint8 [rows, groups, size]")
        require(int(result.codes.max()) <= grid.top, f"keep its codes within 0 and the grid's top, here {grid.top}")
        for name, values, dtype in (("scale", result.scale, grid.dtype), ("offset", result.offset, grid.offset_dtype)):
            require(values.shape == shape[:2], f"give its {name} as [rows, groups]")
            require(values.dtype == dtype, f"give its {name} the grid's type, here {dtype}")
            require(bool(values.isfinite().all()), f"keep its {name} finite")
        _require_grid(result)
        again = tried.prepared(curvature, grouping, grid)(weight)
        require(equal(again, result), "give the same result twice")
        if "never_worse_than_minmax" in tried.claims:
            lost = _lost(tried, result, problem)
            require(not lost.any(), "never have more weighted error than min-max rounding, as it claims")

    with naming(tried):
        curvatures(1, tried.needs)  # raises where there are no examples
        unknown = ", ".join(sorted(set(tried.claims) - set(CLAIMS)))
        require(not unknown, f"claim nothing but {', '.join(CLAIMS)}, where it has {unknown}")
        usual = [Grid(bits=bits, dtype=torch.float16) for bits in range(1, 9)]
        layer = Layer(name="example", rows=64, columns=64)
        times = [tried.nanoseconds(layer, size, grid) for size in PLAIN_SIZES for grid in usual]
        require(all(0 < time < math.inf for time in times), "say with `nanoseconds` a time above zero")
        accepts = any(_allows(tried.check, size, grid) for size in PLAIN_SIZES for grid in usual)
        require(accepts or tried.supports_super_blocks, f"take groups of one of the sizes {PLAIN_SIZES} at 1 to 8 bits")
    if accepts:
        _try(tried, problems(needs=tried.needs), laws)
    if tried.supports_super_blocks:
        _try(tried, block_problems(needs=tried.needs), laws)
    if tried.supports_codebooks:
        _try(tried, block_problems(needs=tried.needs, codebooks=True), laws)


def check_grouper(grouper: type[Grouper] | Grouper) -> None:
    """A grouper says beforehand how large its groups are, and puts every column into exactly one of them."""
    tried = _instance(grouper)
    with naming(tried):
        accepted = [columns for columns in WIDTHS if _allows(tried.size_for, columns)]
        require(bool(accepted), f"accept at least one of {', '.join(map(str, WIDTHS))} columns")

    def laws(problem: Problem) -> None:
        before = copy.deepcopy(problem)
        columns = problem.weight.shape[1]
        grouping = tried.group(problem.weight, problem.curvature)
        require(equal(problem, before), "leave its inputs as they are")
        require(grouping.size == tried.size_for(columns), "make groups of the size that `size_for` tells")
        said = (grouping.order is not None) == tried.reorders
        require(said, "say with `reorders` whether its groups have the columns in another order")
        each = torch.arange(columns)
        covered = grouping.columns == columns and grouping.join(grouping.split(each)).equal(each)
        require(covered, "put every column into exactly one group")

    _try(tried, st.sampled_from(accepted).flatmap(problems), laws)


def check_router(router: type[Router] | Router) -> None:
    """A router gives every token a finite weight of at least zero for every expert."""
    tried = _instance(router)

    def laws(gate: GateOutput) -> None:
        before = copy.deepcopy(gate)
        result = tried.token_weights(gate.probabilities, gate.chosen)
        require(equal(gate, before), "leave its inputs as they are")
        require(result.shape == gate.probabilities.shape, "give weights as [tokens, experts]")
        require(bool((result.isfinite() & (result >= 0)).all()), "keep its weights finite and at least zero")

    _try(tried, gates(), laws)


def check_serializer(serializer: type[Serializer] | Serializer) -> None:
    """A serializer gives back what it packed bit by bit, and refuses with `PlanError` what it cannot hold.

    It refuses bits in `grid`; it may refuse a layer's shape in `pack`, on the meta device, where plans are made.
    """
    tried = _instance(serializer)
    with naming(tried):
        require(not any(_allows(tried.grid, bits) for bits in (0, 9)), "refuse 0 and 9 bits with a PlanError")
        accepted = [grid for bits in range(1, 9) if _allows(tried.grid, bits) for grid in _grids(tried, bits)]
        plain = [_stored(32, 256, size, grid).empty() for size in PLAIN_SIZES for grid in accepted]
        holds_some = any(_allows(tried.pack, planned) for planned in plain)
        require(holds_some, f"hold 256 columns at 1 to 8 bits in groups of one of the sizes {PLAIN_SIZES}")

    def laws(q: Quantized) -> None:
        rows, columns, size, ordered = len(q.codes), q.grouping.columns, q.grouping.size, q.grouping.order is not None
        stored = _stored(rows, columns, size, q.grid, ordered)
        planned = stored.empty()
        if not _allows(tried.pack, planned):
            return
        tensors = tried.pack(q)
        require(same(tried.unpack(tensors, columns, size, q.grid), q), "unpack what it packed, bit by bit")
        if tried.holds_embeddings:
            index = torch.arange(rows).flip(0)[::2]
            picked = tried.unpack(tried.rows(tensors, index), columns, size, q.grid)
            expected = replace(q, codes=q.codes[index], scale=q.scale[index], offset=q.offset[index])
            require(same(picked, expected), "give with `rows` the tensors of a layer that has these rows alone")
        alike = layout(tried.pack(planned)) == layout(tensors)
        require(alike, "pack a layer on the meta device into tensors of the same names, shapes and types")
        DashqLinear(tried, stored, bias=False)  # holds the tensors by their names

    _try(tried, st.sampled_from(accepted).flatmap(quantized_layers), laws)


def check_tuner(tuner: type[Tuner] | Tuner) -> None:
    """A tuner changes tunables alone, goes on from what is saved between steps, and sums a finite loss over tokens."""
    tried = _instance(tuner)
    with naming(tried):
        require_optimizer(tried)
        require_steps(tried)
    _try(tried, predictions(), functools.partial(require_loss, tried))


_CHECKS: Mapping[type[Strategy], Callable[[Any], None]] = {
    Estimator: check_estimator,
    Solver: check_solver,
    Grouper: check_grouper,
    Router: check_router,
    Serializer: check_serializer,
    Tuner: check_tuner,
}


def _grids(serializer: Serializer, bits: int) -> list[Grid]:
    """The usual grid of these bits and those of all types, after the laws of types are checked."""
    usual, types = serializer.grid(bits), serializer.types(bits)
    if not types:
        return [usual]
    grids = list(types.values())
    require(all(grid.bits == bits for grid in grids), f"have types of {bits} bits where it is asked for them")
    require(grids.count(usual) == 1, f"have the grid of {bits} bits among its types, by one name")
    require(all(grids.count(grid) == 1 for grid in grids), "have no two types with the same grid")
    return grids


def _stored(rows: int, columns: int, size: int, grid: Grid, ordered: bool = False) -> StoredLayer:
    layer = Layer(name="example", rows=rows, columns=columns)
    return StoredLayer(layer=layer, grid=grid, size=size, ordered=ordered)


def _require_grid(q: Quantized) -> None:
    """Scales of the sign, and zeros of the kind, that the grid has."""
    grid = q.grid
    if grid.negative_scales:
        require(bool((q.scale != 0).all()), "keep every scale away from zero")
    else:
        require(bool((q.scale > 0).all()), "keep every scale above zero")
    if grid.zero == "real":
        return
    exact = q.offset.equal(-q.scale.float() * q.zeros)
    inside = (q.zeros == grid.middle) if grid.zero == "symmetric" else (q.zeros >= 0) & (q.zeros <= grid.top)
    require(exact and bool(inside.all()), f"keep every zero on the grid, where it is {grid.zero}")


def _try(strategy: Strategy, examples: SearchStrategy[E], laws: Callable[[E], None]) -> None:
    """Hold the laws against drawn examples."""

    # One mistake at a time, since several come as an ExceptionGroup; and no explaining, which traces all of torch.
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )
    @given(examples)
    def test(example: E) -> None:
        with naming(strategy, example):
            laws(example)

    try:
        test()
    except Flaky:
        with naming(strategy):
            require(False, "give the same result twice")


def _instance(strategy: type[S] | S) -> S:
    """The strategy with its defaults; one that is written into a recipe comes back the same."""
    with naming(strategy):
        instance = strategy() if isinstance(strategy, type) else strategy
        fields = instance.model_dump(mode="json")
        require(
            fields.pop("name") == instance.name and instance.model_validate(fields) == instance,
            "come back from its recipe unchanged",
        )
    return instance


def _allows(ask: Callable[..., object], *arguments: object) -> bool:
    try:
        ask(*arguments)
    except PlanError:
        return False
    return True


def _lost(solver: Solver, result: Quantized, problem: Problem) -> Bool[Tensor, "*parts"]:
    """The rows or groups in which the solver's objective is above that of min-max rounding."""
    weights = problem.grouping.split(problem.weight)
    minmax = round_to_nearest(weights, problem.grid, problem.grouping)
    # What float32 cannot tell apart at the size of a weight is no loss.
    slack = 4 * torch.finfo(torch.float32).eps * weights.abs().amax(-1)
    if solver.objective == "rows":  # columns make up for each other's errors: what counts is the row
        error, slack = _joint_error, slack.sum(1)
    elif problem.grid.super_blocks:  # groups of a super-block share its units: what counts is their sum
        error, slack = _in_blocks, slack.sum(1)
    else:
        error = _error
    return error(result, problem) > error(minmax, problem) * (1 + 5e-5) + slack


def _joint_error(q: Quantized, problem: Problem) -> Float[Tensor, " rows"]:
    """The root of (w - ŵ)ᵀ H (w - ŵ) of each row, with a hundredth of its mean added to H's diagonal of mean 1."""
    h = problem.curvature.dense().double()
    mean, flat = h.diagonal().mean(), torch.eye(len(h), dtype=torch.float64)
    h = h / mean + 0.01 * flat if mean > 0 else flat
    e = problem.weight.double() - q.dequantize().double()
    return (e * (e @ h)).sum(1).clamp_min(0).sqrt()


def _in_blocks(q: Quantized, problem: Problem) -> Float[Tensor, " rows"]:
    """The root of the squared error of each row, weighted as the curvature has it."""
    h = problem.curvature.diagonal().double() + 1e-3 * problem.curvature.diagonal().double().mean() + 1e-30
    h = h / h.sum()
    return (h * (problem.weight.double() - q.dequantize().double()).square()).sum(-1).sqrt()


def _error(q: Quantized, problem: Problem) -> Float[Tensor, "rows groups"]:
    """The root of the weighted squared error of each group."""
    h = group_importance(problem.curvature, q.grouping).double()
    return (h * q.grouping.split(problem.weight.double() - q.dequantize().double()).square()).sum(-1).sqrt()
