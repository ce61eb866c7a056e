"""Error feedback: columns are rounded one after the other, and those that follow make up for the error."""

import torch
from jaxtyping import Float
from torch import Tensor

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
        damped = h + damping * torch.eye(len(h), device=h.device)
        # Backwards, the lower factor of H is the inverse of the upper one of H⁻¹, which need not be formed.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            upper = _inverse(lower).flip(0, 1)
            if upper.isfinite().all():
                return upper, damping
        damping = max(10 * damping, 1e-4)
    return None


def _inverse(lower: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """The inverse of a lower triangular matrix; what is known to be zero is not computed."""
    inverse = torch.zeros_like(lower)
    for start in range(0, len(lower), BLOCK):
        block = slice(start, start + BLOCK)
        right = torch.eye(len(lower) - start, device=lower.device)[:, :BLOCK]
        inverse[start:, block] = torch.linalg.solve_triangular(lower[start:, start:], right, upper=False)
    return inverse


def feed_back(joint: Joint, damping: float) -> float | None:
    """Choose all codes anew on the scales and offsets that are there, column by column from the most important on.

    The order changes nothing in what is stored. With a codebook, the columns of a pattern are rounded together. Returns
    the damping that the factorization took; None where no damping helped, and then the codes do not change (GPTQ, arXiv
    2210.17323, on a frozen grid).
    """
    diagonal, codebook = joint.h.diagonal(), joint.grid.codebook
    if codebook:  # the columns of a pattern stay together
        most = diagonal.view(-1, codebook.width).sum(-1).argsort(descending=True, stable=True)
        order = (codebook.width * most[:, None] + torch.arange(codebook.width, device=most.device)).flatten()
    else:
        order = diagonal.argsort(descending=True, stable=True)
    alone = torch.diag((diagonal == 0).float())  # columns that fill up a group, or never see an input
    factorized = factorize((joint.h + alone)[order][:, order], damping)
    if factorized is None:
        return None
    upper, damping = factorized
    # A column of the factor of (H + damping)⁻¹, over its diagonal, says by how much each later column moves to make up
    # for an error of 1 in this one. Columns are rounded a few at a time, which passes errors on within those few; then
    # the rest of the block learns of them, and after a block all columns behind it, in one matrix product each.
    links = -(upper / upper.diagonal()[:, None]).T
    w, codes = joint.w[order], torch.empty_like(joint.w)
    group = order // joint.grouping.size
    scale, offset, top = joint.scale[group], joint.offset[group], Levels.of(joint.grid, w).top
    variances, together = upper.diagonal().square(), codebook.width if codebook else COLUMNS
    for start in range(0, len(w), BLOCK):
        end = min(start + BLOCK, len(w))
        errors = torch.empty_like(w[start:end])
        for first in range(start, end, together):
            now, rest = slice(first, min(first + together, end)), slice(min(first + together, end), end)
            own = w[now], links[now, now]
            if codebook:
                codes[now], error = round_patterns(*own, variances[now], scale[now], codebook)
            else:
                codes[now], error = round_in_turn.form(joint.compiled)(*own, scale[now], offset[now], top)
            w[rest].addmm_(links[rest, now], error, alpha=-1)
            errors[first - start : now.stop - start] = error
        w[end:].addmm_(links[end:, start:end], errors, alpha=-1)
    joint.codes[order] = codes
    return damping
