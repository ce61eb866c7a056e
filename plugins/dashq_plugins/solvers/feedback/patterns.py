"""Patterns of a codebook in the place of single codes: neighbouring columns are chosen together."""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from dashq import Codebook
from dashq_plugins.solvers.feedback.joint import Joint

AT_ONCE = 1 << 17  # costs, so that they stay in the cache
FLIPS = 3  # columns of a pattern whose signs are tried both ways, those that would lose least


def choose_patterns(
    target: Float[Tensor, "width rows"],
    metric: Float[Tensor, "width width"],
    scale: Float[Tensor, " rows"],
    codebook: Codebook,
) -> Float[Tensor, "width rows"]:
    """The levels c of one pattern for each row, with the least (t - s c)ᵀ M (t - s c) for the metric M.

    All patterns are compared, with the signs of the target, and with one of those that matter least turned around.
    """
    x = (target / scale).T
    signs = torch.ones_like(x)[None]
    if codebook.signs:
        signs = torch.where(x < 0, -1.0, 1.0).expand(1 + min(FLIPS, codebook.width), -1, -1).clone()
        weakest = (x.square() * metric.diagonal()).topk(len(signs) - 1, dim=1, largest=False).indices
        for flipped, column in zip(signs[1:], weakest.T[..., None], strict=True):
            flipped.scatter_(1, column, -flipped.gather(1, column))
    # cᵀ M c - 2 cᵀ M x with c = sign · size is linear in the sizes of a pattern and their products.
    first, second = torch.triu_indices(codebook.width, codebook.width, device=x.device)
    twice = torch.where(first == second, 1.0, 2.0)
    products = signs[..., first] * signs[..., second] * (twice * metric[first, second])
    factors = torch.cat([-2 * signs * (x @ metric), products], -1)
    entries, terms = _entries_and_terms(codebook, x.device)
    levels = torch.empty_like(x)
    rows = max(1, AT_ONCE // (len(signs) * len(entries)))
    for own, sign, level in zip(factors.split(rows, 1), signs.split(rows, 1), levels.split(rows), strict=True):
        costs = own @ terms
        # The signs first: finding a least number is quicker than finding where it is.
        best = costs.amin(-1).argmin(0)
        row = torch.arange(len(best), device=x.device)
        torch.mul(entries[costs[best, row].argmin(-1)], sign[best, row], out=level)
    return levels.T


@lru_cache(maxsize=8)
def _entries_and_terms(
    codebook: Codebook, device: torch.device
) -> tuple[Float[Tensor, "patterns width"], Float[Tensor, "terms patterns"]]:
    """The levels of every pattern; below one another, these and the products of each two of them."""
    entries = codebook.entries(device)
    first, second = torch.triu_indices(codebook.width, codebook.width, device=device)
    return entries, torch.cat([entries, entries[:, first] * entries[:, second]], 1).T.contiguous()


def round_patterns(
    target: Float[Tensor, "width rows"],
    links: Float[Tensor, "width width"],
    variances: Float[Tensor, " width"],
    scale: Float[Tensor, "width rows"],
    codebook: Codebook,
) -> tuple[Float[Tensor, "width rows"], Float[Tensor, "width rows"]]:
    """Levels of a pattern's columns, and their errors as `round_in_turn` has them: what each of them adds to the error.

    A column's target is its own less the errors of the columns before it, each times its link to this one; its error
    counts over its variance, the squared diagonal of the factor of H⁻¹.
    """
    # e = v - t + N e for the values v, with the links N below the diagonal.
    inverse = torch.linalg.inv(torch.eye(len(links), device=links.device) - links.tril(-1))
    levels = choose_patterns(target, inverse.T @ (inverse / variances[:, None]), scale[0], codebook)
    return levels, inverse @ (levels * scale - target)


def move_patterns(joint: Joint, group: int, gradient: Float[Tensor, "size rows"]) -> None:
    """One pass over a group's patterns, each taking its best one given all others; changes its `gradient` in place."""
    own, codebook = slice(group, group + 1), joint.grid.codebook
    assert codebook
    part = joint.part(own)
    h, scale, levels, values = joint.h[part, part], joint.scale[group], joint.codes[part], joint.values(own)
    for start in range(0, joint.grouping.size, codebook.width):
        now = slice(start, start + codebook.width)
        metric = h[now, now]
        target = values[now] + torch.linalg.solve(metric, gradient[now])
        choice = choose_patterns(target, metric, scale, codebook)
        before, after = (values[now] - target), (choice * scale - target)
        better = (after * (metric @ after)).sum(0) < (before * (metric @ before)).sum(0)
        moved = torch.where(better, after - before, 0.0)
        levels[now] = torch.where(better, choice, levels[now])
        gradient.addmm_(h[:, now], moved, alpha=-1)
