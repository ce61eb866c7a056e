"""The arithmetic that every solver shares: rounding to a grid, min-max parameters, weighted errors."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.curvature import Curvature
from dashq.data import CACHED, Grid, Grouping, Quantized
from dashq.solving.patterns import nearest_patterns
from dashq.solving.stored_values import spread

# A column that calibration never saw active still counts this share of its group's mean importance.
IMPORTANCE_FLOOR = 1e-3


def group_importance(curvature: Curvature, grouping: Grouping) -> Float[Tensor, "groups size"]:
    """Column importances per group, summing to 1 in each group, no column's zero (method: degenerate cases).

    A group in which no column has any importance is treated as flat.
    """
    diagonal = curvature.diagonal().float()
    h = grouping.split_importance(diagonal)
    mean = h.mean(-1, keepdim=True)
    h = torch.where(mean > 0, h / mean, 1.0) + IMPORTANCE_FLOOR
    h = h * grouping.split_importance(torch.ones_like(diagonal))  # what fills up a group still weighs nothing
    return h / h.sum(-1, keepdim=True)


def groups_without_importance(curvature: Curvature, grouping: Grouping) -> int:
    """The number of groups that `group_importance` has to treat as flat."""
    return int((grouping.split_importance(curvature.diagonal().float()).sum(-1) <= 0).sum())


def minmax_parameters(
    w: Float[Tensor, "rows groups size"], grid: Grid
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Scale and offset, as the grid stores them, that spread the codes over each group's weights."""
    return spread(*w.aminmax(dim=-1), grid)


def encode(
    w: Float[Tensor, "rows groups size"],
    scale: Float[Tensor, "rows groups"],
    offset: Float[Tensor, "rows groups"],
    grid: Grid,
) -> Float[Tensor, "rows groups size"]:
    """The nearest code of each weight: clip(round((w - offset) · (1 / scale)), 0, top), as float.

    With a codebook, the codes of the nearest pattern.
    """
    if grid.codebook:
        x = (w - offset[..., None]) * (1 / scale)[..., None]
        return grid.codebook.codes(nearest_patterns(x, torch.ones_like(x[0]), grid.codebook)).float()
    return ((w - offset[..., None]) * (1 / scale)[..., None]).round_().clamp_(0, grid.top)


def round_to_nearest(w: Float[Tensor, "rows groups size"], grid: Grid, grouping: Grouping) -> Quantized:
    """Min-max rounding: the floor that every solver must beat."""
    return quantized(w, *minmax_parameters(w, grid), grid, grouping)


def quantized(
    w: Float[Tensor, "rows groups size"],
    scale: Float[Tensor, "rows groups"],
    offset: Float[Tensor, "rows groups"],
    grid: Grid,
    grouping: Grouping,
) -> Quantized:
    """Weights rounded with scales and offsets that are already stored values."""
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    rows = max(1, CACHED // w[0].numel()) if w.device.type == "cpu" else len(w)  # at a time, to stay in the cache
    for target, weights, s, m in zip(*(tensor.split(rows) for tensor in (codes, w, scale, offset)), strict=True):
        target.copy_(encode(weights, s, m, grid))
    return Quantized.of(codes, scale, offset, grouping, grid)


def zeros_where_nearer(weight: Float[Tensor, "rows columns"], q: Quantized, curvature: Curvature) -> Quantized:
    """The same layer, with zeros in each group that is too small for the grid's scales and that zeros come nearer to.

    Scales are at least the smallest normal number of their type: a float16 one moves weights of 1e-5 by more than all
    of their size. Errors are Σ h (w - ŵ)², and other groups are left as they are.
    """
    if q.grid.codebook:  # no code need stand for 0
        return q
    w = q.grouping.split(weight)
    small = w.abs().amax(-1) < q.grid.top * q.grid.smallest_scale
    rows, groups = small.nonzero(as_tuple=True)
    if not len(rows):
        return q
    w, h = w[rows, groups], q.grouping.split_importance(curvature.diagonal().float())[groups]
    scale, offset = (values[rows, groups, None].float() for values in (q.scale, q.offset))
    error = (w - (scale * q.codes[rows, groups] + offset)).square().mul(h).sum(-1)
    worse = error > w.square().mul(h).sum(-1)
    rows, groups = rows[worse], groups[worse]
    codes, offsets = q.codes.clone(), q.offset.clone()
    if q.grid.zero == "real":
        offsets[rows, groups] = 0
        codes[rows, groups] = 0
    else:
        codes[rows, groups] = q.zeros[rows, groups, None].to(codes.dtype)
    return replace(q, codes=codes, offset=offsets)


def groups_below_scales(weight: Float[Tensor, "rows columns"], grouping: Grouping, grid: Grid) -> int:
    """The number of groups whose weights differ, but reach less than half of the codes at the smallest scale."""
    low, high = grouping.split(weight).aminmax(dim=-1)
    width = high - low if grid.zero == "real" else high.clamp_min(0) - low.clamp_max(0)
    return int(((width > 0) & (width < grid.top * grid.smallest_scale / 2)).sum())


def weighted_error(
    weight: Float[Tensor, "rows columns"],
    approximation: Float[Tensor, "rows columns"],
    curvature: Curvature,
    row_weights: Float[Tensor, " rows"] | None = None,
) -> float:
    """Σ h (w - ŵ)² over the layer, relative to Σ h w² (0 is perfect, 1 is a layer of zeros).

    With `row_weights` each row's sums count by its weight.
    """
    error, total = weighted_sums(weight, approximation, curvature, row_weights)
    return error / total if total > 0 else 0.0


def weighted_sums(
    weight: Float[Tensor, "rows columns"],
    approximation: Float[Tensor, "rows columns"],
    curvature: Curvature,
    row_weights: Float[Tensor, " rows"] | None = None,
) -> tuple[float, float]:
    """Σ h (w - ŵ)² and Σ h w² over some rows of a layer, as in `weighted_error`."""
    h = curvature.diagonal().float()
    errors, totals = (weight - approximation).square() @ h, weight.square() @ h
    if row_weights is not None:
        errors, totals = errors * row_weights, totals * row_weights
    return float(errors.sum(dtype=torch.float64)), float(totals.sum(dtype=torch.float64))
