"""The patterns of a codebook that come nearest to some weights."""

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.data import Codebook

AT_ONCE = 1 << 22  # distances, so that they take some megabytes


def nearest_patterns(
    x: Float[Tensor, "rows groups size"], h: Float[Tensor, "groups size"], codebook: Codebook
) -> Float[Tensor, "rows groups size"]:
    """The levels of the nearest patterns to weights over their scales: those with the least Σ h (x - level)².

    The patterns' width divides the size of a group.
    """
    entries = codebook.entries(x.device)
    targets = x.unflatten(-1, (-1, codebook.width)).flatten(0, -2)
    importances = h.expand_as(x).unflatten(-1, (-1, codebook.width)).flatten(0, -2)
    nearest = torch.empty_like(targets)
    rows = max(1, AT_ONCE // len(entries))
    for target, importance, part in zip(*(t.split(rows) for t in (targets, importances, nearest)), strict=True):
        # With a sign of its own every weight takes the one that it has, and sizes alone are compared.
        sizes = target.abs() if codebook.signs else target
        distances = importance @ entries.square().T - 2 * (importance * sizes) @ entries.T
        chosen = entries[distances.argmin(-1)]
        part.copy_(torch.where(target < 0, -chosen, chosen) if codebook.signs else chosen)
    return nearest.view_as(x)
