"""The search on grids with a codebook under a diagonal: scales first, on single levels, then patterns and scales."""

import torch
from jaxtyping import Float
from torch import Tensor

from dashq import Codebook, Grid, Grouping, Quantized, SuperBlocks
from dashq.solving import as_unit, factor, nearest_levels, nearest_patterns, on_unit, round_to_nearest

SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15)  # of the largest level that a group's largest weight reaches at first
REACHES = (0.9, 1.0, 1.1)  # how far the largest multiple reaches, as a share of the largest wanted scale
ROUNDS = 3


def search_patterns(
    weight: Float[Tensor, "rows columns"], h: Float[Tensor, "groups size"], grouping: Grouping, grid: Grid
) -> Quantized:
    """Units, multiples and patterns of super-blocks with the least Σ h (w - ŵ)² found, all as they will be stored.

    Scales are searched with every weight on its nearest level; then steps alternate that never raise the error:
    patterns for the scales, the unit by least squares, multiples nearest to the groups' best scales. No super-block is
    worse than min-max rounding.
    """
    kind, codebook, w = grid.super_blocks, grid.codebook, grouping.split(weight)
    assert kind
    assert codebook
    scale = _on_best_units(w, h, _free_scales(w, h, codebook, kind), codebook, kind)
    levels = nearest_patterns(w / scale[..., None], h, codebook)
    minmax = round_to_nearest(w, grid, grouping)
    scale, levels = _better(w, h, (scale, levels), (minmax.scale.float(), minmax.numbers(minmax.codes)), kind)
    for _ in range(ROUNDS):
        new_scale = _fitted(w, h, scale, levels, kind)
        scale, levels = _better(w, h, (scale, levels), (new_scale, levels), kind)
        new_levels = nearest_patterns(w / scale[..., None], h, codebook)
        scale, levels = _better(w, h, (scale, levels), (scale, new_levels), kind)
    return Quantized.of(codebook.codes(levels), scale, -scale * grid.middle, grouping, grid)


def _free_scales(
    w: Float[Tensor, "rows groups size"], h: Float[Tensor, "groups size"], codebook: Codebook, kind: SuperBlocks
) -> Float[Tensor, "rows groups"]:
    """Scales that fit each group best on single levels, as if any number could be stored."""
    largest = w.abs().amax(-1) / codebook.levels[-1]
    best, least = largest, torch.full_like(largest, float("inf"))
    for share in SHARES:
        for sign in (1, -1) if kind.signed else (1,):
            start = sign * largest.clamp_min(torch.finfo(torch.float16).smallest_normal) / share
            levels = nearest_levels(w / start[..., None], codebook)
            scale = _best_scales(w, h, levels, start)
            scale = scale if kind.signed else torch.where(scale > 0, scale, start)
            error = (h * (w - scale[..., None] * levels).square()).sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _on_best_units(
    w: Float[Tensor, "rows groups size"],
    h: Float[Tensor, "groups size"],
    scale: Float[Tensor, "rows groups"],
    codebook: Codebook,
    kind: SuperBlocks,
) -> Float[Tensor, "rows groups"]:
    """The scales as multiples of units that reach to more or less of the largest: those best on single levels."""
    wanted = scale.unflatten(1, (-1, kind.groups))
    largest = wanted.gather(-1, wanted.abs().argmax(-1, keepdim=True))
    best, least = scale, torch.full_like(largest[..., 0], float("inf"))
    for reach in REACHES:
        unit = as_unit(reach * (-largest / (kind.top + 1) if kind.signed else largest / kind.top))
        stored = on_unit(wanted, unit, kind).flatten(1)
        error = _errors(w, h, stored, nearest_levels(w / stored[..., None], codebook), kind)
        better = (error < least).repeat_interleave(kind.groups, 1)
        best, least = torch.where(better, stored, best), torch.minimum(error, least)
    return best


def _fitted(
    w: Float[Tensor, "rows groups size"],
    h: Float[Tensor, "groups size"],
    scale: Float[Tensor, "rows groups"],
    levels: Float[Tensor, "rows groups size"],
    kind: SuperBlocks,
) -> Float[Tensor, "rows groups"]:
    """Multiples nearest to the groups' best scales, then units by least squares, for fixed levels."""
    blocks = scale.unflatten(1, (-1, kind.groups))
    unit = factor(blocks.flatten(0, 1), kind, kind.signed)[0].float().view(*blocks.shape[:2], 1)
    wanted = _best_scales(w, h, levels, scale).view_as(blocks)
    multiples = on_unit(wanted if kind.signed else torch.where(wanted > 0, wanted, blocks), unit, kind) / unit
    a = multiples.round().flatten(1)[..., None] * levels
    products = ((h * a * part).sum(-1).view_as(blocks).sum(-1, keepdim=True) for part in (w, a))
    ax, aa = products
    fitted = as_unit(torch.where((ax * unit > 0) & (aa > 0), ax / aa, unit))
    return (fitted * multiples.round()).flatten(1)


def _best_scales(
    w: Float[Tensor, "rows groups size"],
    h: Float[Tensor, "groups size"],
    levels: Float[Tensor, "rows groups size"],
    otherwise: Float[Tensor, "rows groups"],
) -> Float[Tensor, "rows groups"]:
    """Least squares in each group for fixed levels."""
    scale = (h * levels * w).sum(-1) / (h * levels.square()).sum(-1)
    return torch.where(scale.isfinite() & (scale != 0), scale, otherwise)


def _errors(
    w: Float[Tensor, "rows groups size"],
    h: Float[Tensor, "groups size"],
    scale: Float[Tensor, "rows groups"],
    levels: Float[Tensor, "rows groups size"],
    kind: SuperBlocks,
) -> Float[Tensor, "rows blocks"]:
    """Σ h (w - ŵ)² of each super-block."""
    errors: Tensor = (h * (w - scale[..., None] * levels).square()).sum(-1).unflatten(1, (-1, kind.groups)).sum(-1)
    return errors


State = tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups size"]]


def _better(
    w: Float[Tensor, "rows groups size"], h: Float[Tensor, "groups size"], one: State, other: State, kind: SuperBlocks
) -> State:
    """Scales and levels of the one with less error, super-block by super-block."""
    lower = _errors(w, h, *other, kind) < _errors(w, h, *one, kind)
    groups = lower.repeat_interleave(kind.groups, 1)
    return torch.where(groups, other[0], one[0]), torch.where(groups[..., None], other[1], one[1])
