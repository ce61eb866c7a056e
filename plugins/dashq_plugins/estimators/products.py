"""Second moments of pairs of columns; they are symmetric, so that one half is computed."""

from jaxtyping import Float
from torch import Tensor

STRIPE = 256  # columns: wide enough for a fast product, narrow enough to leave out most of the lower half


def add_products(
    sums: Float[Tensor, "columns columns"], x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]
) -> None:
    """Add xᵀ diag(token_weight) x to `sums`, valid in its upper half alone; `mirrored` fills in the rest."""
    weighted = x if bool((token_weight == 1).all()) else token_weight[:, None] * x
    for start in range(0, x.shape[1], STRIPE):
        stripe = x[:, start : start + STRIPE]
        sums[start : start + STRIPE, start:].addmm_(stripe.T, weighted[:, start:])


def mirrored(sums: Float[Tensor, "columns columns"]) -> Float[Tensor, "columns columns"]:
    """The symmetric matrix with the same upper half; nothing else as large is in memory meanwhile."""
    matrix = sums.triu()
    for start in range(0, len(sums), STRIPE):
        own, rest = slice(start, start + STRIPE), slice(start + STRIPE, None)
        matrix[own, own] += sums[own, own].triu(1).T
        matrix[rest, own] = sums[own, rest].T
    return matrix
