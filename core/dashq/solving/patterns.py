"""The levels and patterns of a codebook that come nearest to some weights."""

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.data import Codebook
from dashq.solving.compiled import Compilable, compiling_pays

AT_ONCE = 1 << 17  # distances, so that they stay in the cache


def nearest_of(x: Float[Tensor, " numbers"], levels: Float[Tensor, " levels"]) -> Float[Tensor, " numbers"]:
    """The nearest of some ascending levels to each number; of two as near the lower one."""
    nearest = levels[0].expand(x.shape)
    for number in range(1, len(levels)):
        nearest = torch.where(x > (levels[number - 1] + levels[number]) / 2, levels[number], nearest)
    return nearest


_in_one_loop = Compilable(nearest_of)


def nearest_levels(x: Float[Tensor, "*shape"], codebook: Codebook) -> Float[Tensor, "*shape"]:
    """The level nearest to each number by itself, whatever the patterns are."""
    levels = torch.tensor(codebook.levels, device=x.device)
    nearest = _in_one_loop.form(compiling_pays(x.numel()))(x.flatten(), levels)
    return nearest.view(x.shape)


def nearest_patterns(
    x: Float[Tensor, "rows groups size"], h: Float[Tensor, "groups size"], codebook: Codebook
) -> Float[Tensor, "rows groups size"]:
    """The levels of the nearest patterns to weights over their scales: those with the least Σ h (x - level)².

    The patterns' width divides the size of a group.
    """
    if codebook.is_scalar:
        return nearest_levels(x, codebook)
    entries = codebook.entries(x.device)
    # Σ h (x - e)² = Σ h x² - 2 Σ h x e + Σ h e², whose last two terms one product has for all entries e.
    terms = torch.cat([entries, entries.square()], 1).T.contiguous()
    targets = x.unflatten(-1, (-1, codebook.width)).flatten(0, -2)
    importances = h.expand_as(x).unflatten(-1, (-1, codebook.width)).flatten(0, -2)
    nearest = torch.empty_like(targets)
    rows = max(1, AT_ONCE // len(entries))
    for target, importance, part in zip(*(t.split(rows) for t in (targets, importances, nearest)), strict=True):
        # With a sign of its own every weight takes the one that it has, and sizes alone are compared.
        sizes = target.abs() if codebook.signs else target
        distances = torch.cat([-2 * importance * sizes, importance], 1) @ terms
        chosen = entries[distances.argmin(-1)]
        part.copy_(torch.where(target < 0, -chosen, chosen) if codebook.signs else chosen)
    return nearest.view_as(x)
