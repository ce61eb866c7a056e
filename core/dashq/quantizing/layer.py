"""One layer on the way: it is grouped, solved in strips of rows, and judged."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dashq.calibration.layers import Observation
from dashq.calibration.strips import strips_of
from dashq.curvature import Curvature
from dashq.data import Grid, Grouping, Quantized
from dashq.device import type_name, wait_for
from dashq.errors import CheckpointError, PluginError
from dashq.recipe.plan import LayerPlan
from dashq.results.report import LayerReport, digest
from dashq.solving.arithmetic import (
    groups_below_scales,
    groups_without_importance,
    round_to_nearest,
    weighted_sums,
    zeros_where_nearer,
)
from dashq.strategies import Solver


class SolvedStrip(NamedTuple):
    """Some rows of a layer as its solver returns them, as a tree that can be sent, and the seconds that it took."""

    codes: UInt8[Tensor, "rows groups size"]
    scale: Float[Tensor, "rows groups"]
    offset: Float[Tensor, "rows groups"]
    statistics: dict[str, float]
    fallbacks: list[str]
    seconds: float


class Prepared(NamedTuple):
    """A solver's preparation for all rows of a layer, and all that it follows from."""

    solver: Solver
    curvature: Curvature
    grouping: Grouping
    grid: Grid
    solve: Callable[[Float[Tensor, "rows columns"]], Quantized]

    def serves(self, plan: LayerPlan, curvature: Curvature, grouping: Grouping) -> bool:
        """True for a layer that shares the inputs and, in their own order, the groups, and is solved alike."""
        alike = (plan.scheme.solver, plan.grid, grouping.size) == (self.solver, self.grid, self.grouping.size)
        return alike and curvature is self.curvature and self.grouping.order is None and grouping.order is None


class Preparations:
    """Lets layers that share their inputs, such as q, k and v, share what is prepared; one at a time is in memory."""

    def __init__(self) -> None:
        self._last: Prepared | None = None

    def prepared(self, plan: LayerPlan, curvature: Curvature, grouping: Grouping) -> Prepared:
        """The preparation for a layer: that of the layer before it where it serves this one as well."""
        if self._last is None or not self._last.serves(plan, curvature, grouping):
            self._last = None  # its memory is free before the next one takes as much
            solver, grid = plan.scheme.solver, plan.grid
            solve = solver.prepared(curvature, grouping, grid)
            self._last = Prepared(solver, curvature, grouping, grid, solve)
        return self._last


class LayerWork:
    """One layer while it is solved strip by strip, here or in other processes."""

    def __init__(
        self,
        plan: LayerPlan,
        weight: Float[Tensor, "rows columns"],
        observation: Observation,
        preparations: Preparations | None = None,
    ) -> None:
        """Group the columns; a `CheckpointError` where the weights do not fit the format's numbers.

        `preparations` are shared with the layers before and after this one.
        """
        largest, limit = max(abs(float(end)) for end in weight.aminmax()), torch.finfo(plan.grid.dtype).max
        if largest > limit:
            raise CheckpointError(
                f"{plan.layer.name}: weights up to {largest:g} do not fit the format's {type_name(plan.grid.dtype)} "
                "numbers"
            )
        self.plan, self.weight, self.observation = plan, weight, observation
        self._grouping = plan.scheme.grouper.group(weight, observation.curvature)
        self._preparations = preparations or Preparations()
        self._strips = strips_of(plan)
        self._solved: dict[int, SolvedStrip] = {}

    @property
    def is_whole(self) -> bool:
        """True when every strip is solved."""
        return len(self._solved) == len(self._strips)

    def solve(self, numbers: Iterable[int] | None = None) -> None:
        """Solve strips of these numbers, or all."""
        start, curvature = time.perf_counter(), self.observation.curvature
        solve = self.prepared()
        for number in range(len(self._strips)) if numbers is None else numbers:
            weight = self.weight[self._strips[number]]
            q = zeros_where_nearer(weight, solve(weight), curvature)
            wait_for(weight.device)
            now = time.perf_counter()
            self.take(number, SolvedStrip(q.codes, q.scale, q.offset, {**q.statistics}, [*q.fallbacks], now - start))
            start = now

    def prepared(self) -> Callable[[Float[Tensor, "rows columns"]], Quantized]:
        """The function that solves some rows."""
        return self._preparations.prepared(self.plan, self.observation.curvature, self._grouping).solve

    def solved(self, number: int) -> SolvedStrip:
        """A strip that is solved."""
        return self._solved[number]

    def take(self, number: int, strip: SolvedStrip) -> None:
        """Take in a solved strip."""
        self._solved[number] = strip

    def finished(self) -> tuple[Quantized, LayerReport]:
        """The layer, once every strip is solved, judged beside min-max rounding."""
        strips, grouping = [self._solved[number] for number in range(len(self._strips))], self._grouping
        plan, layer, scheme, grid = self.plan, self.plan.layer, self.plan.scheme, self.plan.grid
        weight, observation, curvature = self.weight, self.observation, self.observation.curvature
        quantized = joined(strips, grouping, grid)
        error, minmax_error, small = self._errors(strips)
        report = LayerReport(
            name=layer.name,
            rows=layer.rows,
            columns=layer.columns,
            bits=grid.bits,
            group_size=grouping.size,
            ordered=grouping.order is not None,
            bytes=plan.bytes,
            digest=digest(quantized),
            solver=scheme.solver.name,
            estimator=scheme.estimator.name,
            tokens=observation.tokens,
            expert=layer.expert,
            role=layer.role,
            type=scheme.type,
            effective_tokens=observation.effective_tokens,
            shrinkage=observation.shrinkage,
            error=error,
            minmax_error=minmax_error,
            seconds=sum(strip.seconds for strip in strips),
            statistics=_statistics(plan, curvature, quantized),
            fallbacks=(
                *_flat_groups(curvature, grouping),
                *_groups_below_scales(small, len(weight) * grouping.groups, grid),
                *quantized.fallbacks,
            ),
        )
        return quantized, report

    def _errors(self, strips: Sequence[SolvedStrip]) -> tuple[float, float, int]:
        """The weighted errors of the layer and of min-max rounding, and the number of groups below the scales.

        Strip by strip: of a head with a hundred thousand rows, copies of all weights would be most of the run's memory.
        """
        grouping, grid, curvature = self._grouping, self.plan.grid, self.observation.curvature
        weights, small = self.observation.row_weights, 0
        errors, minmax_errors = [], []
        for rows, strip in zip(self._strips, strips, strict=True):
            weight, own = self.weight[rows], None if weights is None else weights[rows]
            solved = Quantized.of(strip.codes, strip.scale, strip.offset, grouping, grid)
            minmax = zeros_where_nearer(weight, round_to_nearest(grouping.split(weight), grid, grouping), curvature)
            errors.append(weighted_sums(weight, solved.dequantize(), curvature, own))
            minmax_errors.append(weighted_sums(weight, minmax.dequantize(), curvature, own))
            small += groups_below_scales(weight, grouping, grid)
        return _share(errors), _share(minmax_errors), small


def solve_together(works: Sequence[LayerWork]) -> None:
    """Solve whole layers that share what is prepared, in one call for the rows of all; others one after the other.

    Figures about the solver's work are those of the call, and its seconds are each layer's by its rows.
    """
    start, curvature = time.perf_counter(), works[0].observation.curvature
    solve = works[0].prepared()
    if any(work.prepared() is not solve for work in works):
        for work in works:
            work.solve()
        return
    weight = torch.cat([work.weight for work in works])
    q = zeros_where_nearer(weight, solve(weight), curvature)
    wait_for(weight.device)
    seconds, end = time.perf_counter() - start, 0
    for work in works:
        rows, end = slice(end, end + len(work.weight)), end + len(work.weight)
        own = seconds * len(work.weight) / len(weight)
        work.take(0, SolvedStrip(q.codes[rows], q.scale[rows], q.offset[rows], {**q.statistics}, [*q.fallbacks], own))


def quantize_layer(
    plan: LayerPlan, weight: Float[Tensor, "rows columns"], observation: Observation
) -> tuple[Quantized, LayerReport]:
    """Group, solve and judge one layer; a `CheckpointError` where its weights do not fit the format's numbers."""
    work = LayerWork(plan, weight, observation)
    work.solve()
    return work.finished()


def joined(strips: Sequence[SolvedStrip], grouping: Grouping, grid: Grid) -> Quantized:
    """The layer that strips of rows make up; figures about the solver's work are means over their rows."""
    if len(strips) == 1:
        codes, scale, offset, statistics, fallbacks, _ = strips[0]
        return replace(Quantized.of(codes, scale, offset, grouping, grid), statistics=statistics, fallbacks=fallbacks)
    rows = [len(strip.codes) for strip in strips]
    means = {
        name: sum(count * strip.statistics[name] for count, strip in zip(rows, strips, strict=True)) / sum(rows)
        for name in strips[0].statistics
    }
    whole = Quantized.of(
        torch.cat([strip.codes for strip in strips]),
        torch.cat([strip.scale for strip in strips]),
        torch.cat([strip.offset for strip in strips]),
        grouping,
        grid,
    )
    sentences = dict.fromkeys(sentence for strip in strips for sentence in strip.fallbacks)
    return replace(whole, statistics=means, fallbacks=tuple(sentences))


def _statistics(plan: LayerPlan, curvature: Curvature, quantized: Quantized) -> Mapping[str, float]:
    """The figures of the estimator and of the solver; a `PluginError` where both have one of the same name."""
    if shared := curvature.report.keys() & quantized.statistics.keys():
        raise PluginError(
            f"{plan.layer.name}: estimator {plan.scheme.estimator.name!r} and solver {plan.scheme.solver.name!r} both "
            f"report a figure {min(shared)!r}; one of the two has to call it otherwise"
        )
    return {**curvature.report, **quantized.statistics}


def _flat_groups(curvature: Curvature, grouping: Grouping) -> tuple[str, ...]:
    flat = groups_without_importance(curvature, grouping)
    return (f"{flat} of {grouping.groups} groups of columns saw no input: treated as flat",) if flat else ()


def _share(sums: Sequence[tuple[float, float]]) -> float:
    """The errors of all strips together, relative to the errors of zeros."""
    error, total = (sum(own) for own in zip(*sums, strict=True))
    return error / total if total > 0 else 0.0


def _groups_below_scales(small: int, groups: int, grid: Grid) -> tuple[str, ...]:
    if not small:
        return ()
    return (
        f"{small} of {groups} groups have weights too small for scales of at least {grid.smallest_scale:.1g}, and are "
        "kept roughly or as zeros: a format with `dtype: bfloat16` holds them",
    )
