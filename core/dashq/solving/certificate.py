"""The distance of a layer's codes from the global optimum, measured on a random sample of its groups."""

import zlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.curvature import Curvature
from dashq.data import Quantized
from dashq.solving.arithmetic import group_importance
from dashq.solving.optimum import events, find_optimum

# Changes of codes that the sweeps of one layer's sample may visit: a few tenths of a second.
EVENTS_PER_LAYER = 1 << 20
# Below this share of Σ h w² an optimum counts as zero: weights that lie on a grid already.
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The share by which Σ h (w - ŵ)² of `groups` groups lies above the least of any codes, scales and offsets."""

    gap: float
    groups: int


def certify(
    name: str,
    weight: Float[Tensor, "rows columns"],
    quantized: Quantized,
    curvature: Curvature,
    groups: int,
    most_events: int = EVENTS_PER_LAYER,
) -> Certificate | None:
    """Compare at most `groups` random groups of a layer with their optimum; None where one alone would take too long.

    The same layer gives the same sample. Importances sum to 1 in each group, as solvers see them.
    """
    grouping, grid = quantized.grouping, quantized.grid
    groups = min(groups, most_events // events(grouping.size, grid))
    if groups == 0:
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    row = torch.randint(len(weight), (groups,), generator=generator)
    group = torch.randint(grouping.groups, (groups,), generator=generator)
    w = grouping.split(weight)[row, group].cpu().double()
    h = group_importance(curvature, grouping)[group].cpu().double()
    scale, offset = (values[row, group].cpu().double()[:, None] for values in (quantized.scale, quantized.offset))
    error = h * (w - scale * quantized.codes[row, group].cpu() - offset).square()
    least = float(find_optimum(w, h, grid).error.sum())
    gap = (float(error.sum()) - least) / max(least, NEGLIGIBLE * float((h * w * w).sum()), 1e-300)
    return Certificate(gap=max(gap, 0.0), groups=groups)
