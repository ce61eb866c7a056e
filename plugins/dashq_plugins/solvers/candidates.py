"""Scales and offsets that solvers choose from under a diagonal: of min-max rounding, a search, and alternations."""

from jaxtyping import Float
from torch import Tensor

from dashq.solving import Descent, Piece, ScaleAndOffset, alternate, search_scales

# Reconstructed by independent readers of arXiv 2604.13806; not checked against its text.
PAPER_ITERATIONS = 9
PAPER = Descent(damping=0.5, ridge=1e-2)


def stored_candidates(piece: Piece) -> list[tuple[Float[Tensor, "1 groups rows"], Float[Tensor, "1 groups rows"]]]:
    """Scales and offsets as stored, min-max rounding first, from which the alternations start."""
    scale, offset = piece.minmax
    start = scale, piece.zero(scale, offset)
    alternations = [alternate(piece, *start, PAPER_ITERATIONS, descent)[:2] for descent in (Descent(), PAPER)]
    return [(scale, offset), *(piece.stored(*parameters) for parameters in (search_scales(piece), *alternations))]


def best_candidate(piece: Piece) -> ScaleAndOffset:
    """For each row the candidate with the least Σ h (w - ŵ)²."""
    return piece.best(*stored_candidates(piece))
