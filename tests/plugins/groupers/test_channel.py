"""A whole row shares one scale."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq import Diagonal
from dashq_plugins.groupers.channel import ChannelGrouper


@given(st.integers(1, 600))
def test_a_channel_is_one_group(columns: int) -> None:
    grouping = ChannelGrouper().group(torch.zeros(2, columns), Diagonal(torch.ones(columns)))
    assert (grouping.groups, grouping.size, ChannelGrouper().size_for(columns)) == (1, columns, columns)
