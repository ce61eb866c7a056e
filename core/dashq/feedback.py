"""Error feedback: columns are rounded one after the other, and those that follow make up for the error."""

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.joint import Joint

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
            upper = torch.linalg.solve_triangular(lower, torch.eye(len(h), device=h.device), upper=False).flip(0, 1)
            if upper.isfinite().all():
                return upper, damping
        damping = max(10 * damping, 1e-4)
    return None


def feed_back(joint: Joint, damping: float) -> float | None:
    """Choose all codes anew on the scales and offsets that are there, column by column from the most important on.

    The order changes nothing in what is stored. Returns the damping that the factorization took; None where there
    was none to be had, and then the codes stay as they are (GPTQ, arXiv 2210.17323, on a frozen grid).
    """
    diagonal = joint.h.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    alone = torch.diag((diagonal == 0).float())  # columns that fill up a group, or never see an input
    factorized = factorize((joint.h + alone)[order][:, order], damping)
    if factorized is None:
        return None
    upper, damping = factorized
    w = joint.w[order]
    group = order // joint.grouping.size
    scale, offset, top = joint.scale[group], joint.offset[group], joint.grid.top
    codes, pivots = torch.empty_like(w), upper.diagonal().tolist()
    for start in range(0, len(w), BLOCK):
        block = slice(start, min(start + BLOCK, len(w)))
        ours, factor = w[block], upper[block, block]
        errors = torch.empty_like(ours)
        columns = zip(*(x[block].unbind() for x in (w, scale, offset, codes)), errors.unbind(), strict=True)
        for column, (pivot, (x, s, m, code, error)) in enumerate(zip(pivots[block], columns, strict=True)):
            torch.sub(x, m, out=code).div_(s).round_().clamp_(0, top)
            torch.sub(x, torch.addcmul(m, code, s), out=error).div_(pivot)
            ours[column + 1 :].addr_(factor[column, column + 1 :], error, alpha=-1)
        w[block.stop :].addmm_(upper[block, block.stop :].T, errors, alpha=-1)
    joint.codes[order] = codes
    return damping
