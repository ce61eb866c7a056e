"""Tensors and groupings for tests."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from dashq import Grouping
from dashq.model.decoder import Model


def noise(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def groupings(draw: st.DrawFn) -> Grouping:
    """Groups of any size, the columns in any order or as they are."""
    columns = draw(st.integers(1, 40))
    order = draw(st.none() | st.permutations(range(columns)))
    size = draw(st.integers(1, 50))
    return Grouping(columns=columns, size=size, order=None if order is None else torch.tensor(order))


def tensors_of(model: Model) -> dict[str, Tensor]:
    """Everything that the model reads, a block at a time."""
    with model.outside() as outside:
        tensors = dict(outside)
    for block in model.walk():
        tensors |= block.tensors
    return tensors
