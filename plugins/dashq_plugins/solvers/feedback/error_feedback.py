"""Error feedback: columns are rounded one after the other, and those that follow make up for the error."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dashq import Grid
from dashq.solving import Levels
from dashq_plugins.solvers.feedback.joint import Joint
from dashq_plugins.solvers.feedback.patterns import round_patterns
from dashq_plugins.solvers.feedback.successive import COLUMNS, round_in_turn

BLOCK = 128  # columns whose errors are passed on together, as one matrix product
MOST_DAMPING = 1.0  # added to a mean diagonal of 1


def factorize(
    h: Float[Tensor, "columns columns"], damping: float
) -> tuple[Float[Tensor, "columns columns"], float] | None:
    """Upper Cholesky factor of (H + damping)⁻¹ and the damping that it took: more, tenfold, until H can be factorized.

    None where even a damping of 1 does not help.
    """
    while damping <= MOST_DAMPING:
        # Backwards, the lower factor of H is the inverse of the upper one of H⁻¹, which need not be formed.
        damped = h.flip(0, 1)
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # each of these may be gigabytes
        if not failed:
            inverse = _inverse(lower)
            del lower
            upper = inverse.flip(0, 1)
            del inverse
            if upper.isfinite().all():
                return upper, damping
        damping = max(10 * damping, 1e-4)
    return None


def _inverse(lower: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """The inverse of a lower triangular matrix; what is known to be zero is not computed."""
    inverse = torch.zeros_like(lower)
    for start in range(0, len(lower), BLOCK):
        block, rest = slice(start, start + BLOCK), len(lower) - start
        right = torch.eye(rest, min(BLOCK, rest), device=lower.device)
        inverse[start:, block] = torch.linalg.solve_triangular(lower[start:, start:], right, upper=False)
    return inverse


@dataclass(frozen=True, eq=False)
class Succession:
    """The columns in the order in which they take their turns, and what each passes on to those after it.

    A column of the factor of (H + `damping`)⁻¹, over its diagonal, says by how much each later column moves to make up
    for an error of 1 in this one: `links`. Its diagonal squared are the `variances`.
    """

    order: Int[Tensor, " columns"]
    links: Float[Tensor, "columns columns"]
    variances: Float[Tensor, " columns"]
    damping: float

    @classmethod
    def of(cls, h: Float[Tensor, "columns columns"], grid: Grid) -> "Succession | None":
        """From the most important column on; None where H cannot be factorized with any damping.

        With a codebook, the columns of a pattern stay together. `damping` is what the factorization took.
        """
        diagonal, codebook = h.diagonal(), grid.codebook
        if codebook:
            most = diagonal.view(-1, codebook.width).sum(-1).argsort(descending=True, stable=True)
            order = (codebook.width * most[:, None] + torch.arange(codebook.width, device=most.device)).flatten()
        else:
            order = diagonal.argsort(descending=True, stable=True)
        ordered = h[order[:, None], order]
        ordered.diagonal().add_((diagonal == 0)[order])  # columns that fill up a group, or never see an input
        factorized = factorize(ordered, 0.0)
        if factorized is None:
            return None
        upper, damping = factorized
        variances = upper.diagonal().square()
        links = upper.div_(upper.diagonal().clone()[:, None]).neg_().T
        return cls(order, links, variances, damping)


def feed_back(joint: Joint, turns: Succession) -> None:
    """Choose all codes anew on the scales and offsets that are there, column by column.

    The order changes nothing in what is stored. The columns of a codebook's pattern are rounded together (GPTQ, arXiv
    2210.17323, on a frozen grid).
    """
    order, links, variances, patterns = turns.order, turns.links, turns.variances, joint.patterns
    w, codes = joint.w[order], torch.empty_like(joint.w)
    group = order // joint.grouping.size
    scale, offset, top = joint.scale[group], joint.offset[group], Levels.of(joint.grid, w).top
    together, levels = patterns.width if patterns else COLUMNS, joint.levels
    # Columns are rounded a few at a time, which passes errors on within those few; then the rest of the block learns of
    # them, and after a block all columns behind it, in one matrix product each.
    for start in range(0, len(w), BLOCK):
        end = min(start + BLOCK, len(w))
        errors = torch.empty_like(w[start:end])
        for first in range(start, end, together):
            now, rest = slice(first, min(first + together, end)), slice(min(first + together, end), end)
            own = w[now], links[now, now]
            if patterns:
                codes[now], error = round_patterns(*own, variances[now], scale[now], patterns)
            else:
                codes[now], error = round_in_turn.form(joint.compiled)(*own, scale[now], offset[now], top, None, levels)
            w[rest].addmm_(links[rest, now], error, alpha=-1)
            errors[first - start : now.stop - start] = error
        w[end:].addmm_(links[end:, start:end], errors, alpha=-1)
    joint.codes[order] = codes
