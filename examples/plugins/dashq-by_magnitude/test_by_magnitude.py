"""The contract that dashq expects of every grouper, and what this one is for."""

import pytest
import torch

from dashq import Diagonal, Grid, Grouping, PlanError
from dashq.solving import round_to_nearest
from dashq.testing import check_strategy
from dashq_by_magnitude import ByMagnitudeGrouper


def test_the_contract_is_kept() -> None:
    check_strategy(ByMagnitudeGrouper)
    check_strategy(ByMagnitudeGrouper(size=32))


def test_small_columns_keep_their_resolution_among_large_ones() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight[:, ::4] *= 10
    small = torch.arange(64) % 4 > 0
    grid, flat = Grid(bits=3, dtype=torch.float16), Diagonal(torch.ones(64))
    groupings = (ByMagnitudeGrouper(size=16).group(weight, flat), Grouping(columns=64, size=16))
    ordered, neighbours = (
        (round_to_nearest(grouping.split(weight), grid, grouping).dequantize() - weight)[:, small].square().mean()
        for grouping in groupings
    )
    assert ordered < neighbours / 10


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(PlanError, match="64 does not divide 100"):
        ByMagnitudeGrouper().size_for(100)
