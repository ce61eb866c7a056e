"""The contract of curvatures: each answers as the `Full` curvature with the same matrix does."""

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.curvature import Coupled, Curvature, Diagonal, Full
from dashq.testing.laws import naming, require

SHARES = (0.0, 0.25, 1.0)
TOLERANCE = 1e-3  # of the largest expected number: rounding of float32 sums, and of an inverse


def check_curvature(curvature: Curvature, other: Curvature | None = None) -> None:
    """Check a curvature, alone and blended with another of the same columns; without one, with a flat diagonal.

    Raises AssertionError with the curvature's class and the law that it breaks.
    """
    with naming(curvature, curvature):
        require_laws(curvature, Diagonal(torch.ones_like(curvature.diagonal())) if other is None else other)


def require_laws(curvature: Curvature, other: Curvature) -> None:
    """Raise a `BrokenLaw` unless all members agree with `dense`, and `dense` is a second moment."""
    h, matrix = curvature.diagonal(), curvature.dense()
    require(h.dim() == 1 and bool((h.isfinite() & (h >= 0)).all()), "keep its diagonal finite and at least zero")
    require(matrix.shape == (len(h), len(h)), "give `dense` as [columns, columns]")
    require(bool(matrix.isfinite().all()), "keep `dense` finite")
    require(_agree(matrix, matrix.T), "keep `dense` symmetric")
    require(_agree(matrix.diagonal(), h), "give as `diagonal` that of `dense`")
    alone = isinstance(curvature, Coupled) or _agree(matrix, torch.diag(h))
    require(alone, "be a `Coupled` where it knows what lies off the diagonal")
    require(0 <= curvature.shrinkage <= 1, "keep its `shrinkage` within 0 and 1")
    full = Full(matrix, shrinkage=curvature.shrinkage)
    weight = _noise(0, 3, len(h))
    errors, expected = curvature.row_errors(weight), full.row_errors(weight)
    require(errors.dtype == torch.float64 and errors.shape == (3,), "give `row_errors` as float64 [rows]")
    require(_agree(errors, expected), "give as `row_errors` those of `dense`")
    for share in SHARES:
        blend, expected = curvature.blended(other, share), full.blended(other, share).dense()
        require(
            _agree(blend.dense(), expected), "give as `blended` (1 - share) of its `dense` and share of the other's"
        )
    # Quantized layers turn the inputs x into x̂, where x - x̂ is a linear map of x̂: then the shift is that of H.
    shift = 0.1 * _noise(1, len(h), len(h)) @ matrix.float()
    for share in SHARES:
        change = curvature.corrected(weight, shift, share) - weight
        expected = full.corrected(weight, shift, share) - weight
        require(_agree(change, expected), "correct weights as the `Full` with its `dense` and `shrinkage` does")


def _agree(one: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> bool:
    """True where two tensors differ by no more than rounding."""
    scale = float(other.double().abs().max()) if other.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=0, atol=TOLERANCE * scale + 1e-30)


def _noise(seed: int, *shape: int) -> Float[Tensor, "*shape"]:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
