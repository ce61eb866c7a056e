"""Values are compared bit by bit or up to the rounding of sums, and described without their numbers."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Diagonal, Full, Grid, Grouping
from dashq.solving.arithmetic import round_to_nearest
from dashq.testing.comparison import close, equal, layout, same, shape_of
from tensors import groupings, noise

GRID = Grid(bits=3, dtype=torch.float16)


@dataclass(frozen=True, eq=False)
class Pair:
    name: str
    values: Tensor


@pytest.mark.parametrize(
    ("one", "other", "are"),
    [
        (torch.ones(2), torch.ones(2), True),
        (torch.ones(2), torch.ones(2) + 2**-23, False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2), torch.ones(2, 1), False),
        (torch.ones(2), [1.0, 1.0], False),
        (Pair("a", torch.ones(2)), Pair("a", torch.ones(2)), True),
        (Pair("a", torch.ones(2)), Pair("b", torch.ones(2)), False),
        (Pair("a", torch.ones(2)), Pair("a", torch.zeros(2)), False),
        (Diagonal(torch.ones(2)), Full(torch.eye(2)), False),
        (Pair("a", torch.ones(2)), "a", False),
        (None, None, True),
        ("a", "b", False),
    ],
)
def test_values_are_equal_where_every_bit_and_every_field_is(one: object, other: object, are: bool) -> None:
    assert equal(one, other) == are


@settings(max_examples=40)
@given(groupings(), st.integers(0, 999))
def test_layers_are_the_same_whatever_fills_up_the_last_group_and_whatever_the_type_of_their_order(
    grouping: Grouping, seed: int
) -> None:
    q = round_to_nearest(grouping.split(noise(seed, 2, grouping.columns)), GRID, grouping)
    codes = q.codes.clone()
    codes.flatten(1)[:, grouping.columns :] += 1
    codes = codes.view_as(q.codes)
    order = None if grouping.order is None else grouping.order.int()
    other = replace(q, codes=codes, grouping=replace(grouping, order=order))
    assert same(q, other)
    assert same(other, q)


def test_layers_that_differ_in_any_number_are_not_the_same() -> None:
    grouping = Grouping(columns=6, size=4, order=torch.tensor([0, 1, 2, 3, 5, 4]))
    q = round_to_nearest(grouping.split(noise(0, 2, 6)), GRID, grouping)
    codes = q.codes.clone()
    codes[1, 1, 1] ^= 1
    others = [
        replace(q, codes=codes),
        replace(q, scale=q.scale * 2),
        replace(q, scale=q.scale.float()),
        replace(q, offset=q.offset + 1),
        replace(q, grid=replace(GRID, bits=4)),
        replace(q, grouping=replace(grouping, order=None)),
        replace(q, grouping=replace(grouping, order=torch.arange(6))),
    ]
    assert same(q, q)
    assert [same(q, other) for other in others] == [False] * len(others)


def test_curvatures_are_close_where_they_differ_by_the_rounding_of_sums() -> None:
    h = noise(0, 5).square()
    x = noise(1, 20, 5)
    full = Full(x.T @ x)
    assert close(Diagonal(h), Full(torch.diag(h * (1 + 1e-5))))
    assert not close(Diagonal(h), Diagonal(h * 1.01))
    assert not close(full, Diagonal(full.diagonal()))
    small = torch.zeros(5, 5)
    small[0, 1] = 1e-7 * float(full.matrix.max())
    assert close(Full(full.matrix + small), full)


def test_a_layout_is_the_shape_and_the_type_of_each_tensor() -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(1, dtype=torch.uint8, device="meta")}
    assert layout(tensors) == {"a": ((2, 3), torch.float32), "b": ((1,), torch.uint8)}


def test_an_example_is_described_by_its_shapes() -> None:
    grouping = Grouping(columns=3, size=2, order=torch.tensor([2, 1, 0]))
    assert shape_of(grouping) == "Grouping(columns=3, size=2, order=[3])"
    assert shape_of(Pair("a", torch.ones(2, 1))) == "Pair(name=a, values=[2, 1])"
    assert shape_of(7) == "7"
