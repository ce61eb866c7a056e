"""One layer on the way: it is grouped, solved and judged."""

import time
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.calibration.layers import Observation
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
    weighted_error,
    zeros_where_nearer,
)


def quantize_layer(
    plan: LayerPlan, weight: Float[Tensor, "rows columns"], observation: Observation
) -> tuple[Quantized, LayerReport]:
    """Group, solve and judge one layer; a `CheckpointError` where its weights do not fit the format's numbers."""
    start = time.perf_counter()
    layer, scheme, grid = plan.layer, plan.scheme, plan.grid
    largest, limit = float(weight.abs().max()), torch.finfo(grid.dtype).max
    if largest > limit:
        raise CheckpointError(
            f"{layer.name}: weights up to {largest:g} do not fit the format's {type_name(grid.dtype)} numbers"
        )
    curvature = observation.curvature
    grouping = scheme.grouper.group(weight, curvature)
    quantized = zeros_where_nearer(weight, scheme.solver.solve(weight, curvature, grouping, grid), curvature)
    wait_for(weight.device)
    seconds = time.perf_counter() - start
    minmax = zeros_where_nearer(weight, round_to_nearest(grouping.split(weight), grid, grouping), curvature)
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
        effective_tokens=observation.effective_tokens,
        shrinkage=observation.shrinkage,
        error=weighted_error(weight, quantized.dequantize(), curvature, observation.row_weights),
        minmax_error=weighted_error(weight, minmax.dequantize(), curvature, observation.row_weights),
        seconds=seconds,
        statistics=_statistics(plan, curvature, quantized),
        fallbacks=(
            *_flat_groups(curvature, grouping),
            *_groups_below_scales(weight, grouping, grid),
            *quantized.fallbacks,
        ),
    )
    return quantized, report


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


def _groups_below_scales(weight: Float[Tensor, "rows columns"], grouping: Grouping, grid: Grid) -> tuple[str, ...]:
    small, groups = groups_below_scales(weight, grouping, grid), len(weight) * grouping.groups
    if not small:
        return ()
    return (
        f"{small} of {groups} groups have weights too small for scales of at least {grid.smallest_scale:.1g}, and are "
        "kept roughly or as zeros: a format with `dtype: bfloat16` holds them",
    )
