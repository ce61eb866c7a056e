"""Columns rounded one after the other, each to make up for the errors of those before it."""

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.solving import Compilable, clip, materialize, nearest_of

# Columns that one call rounds: few, since each pair of them is a step of its own in the compiled loop.
COLUMNS = 8


@Compilable
def round_in_turn(
    target: Float[Tensor, "columns rows"],
    links: Float[Tensor, "columns columns"],
    scale: Float[Tensor, "columns rows"],
    offset: Float[Tensor, "columns rows"],
    top: Float[Tensor, ""],
    reference: Float[Tensor, "columns rows"] | None = None,
    levels: Float[Tensor, " levels"] | None = None,
) -> tuple[Float[Tensor, "columns rows"], Float[Tensor, "columns rows"]]:
    """Codes of the columns, and errors: the difference of their values from the reference, or from what was rounded.

    A column's target is rounded less the errors of the columns before it, each times its link to this one: to whole
    codes, or to the nearest of some ascending `levels`. The loop over columns is unrolled where it is compiled, so that
    all of a few rows stays in registers.
    """
    codes: list[Tensor] = []  # a call of `list[Tensor]` would break the compiled graph in two
    errors: list[Tensor] = []
    for column, x in enumerate(target.unbind()):
        for error, link in zip(errors, links[column, :column].unbind(), strict=True):
            x = x - link * error
        x = materialize(x)
        code = (x - offset[column]) * scale[column].reciprocal()  # as `1 / scale` is computed, with one call less
        codes.append(clip(code.round(), top) if levels is None else materialize(nearest_of(materialize(code), levels)))
        errors.append(
            materialize(offset[column] + codes[-1] * scale[column] - (x if reference is None else reference[column]))
        )
    return torch.stack(codes), torch.stack(errors)
