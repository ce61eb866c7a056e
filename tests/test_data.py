"""Layers know their block, stack and weights; columns are cut into groups and joined again without loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq import Grid, Grouping, Layer, StoredLayer, Zero
from dashq.data import average_bits
from dashq.solving import round_to_nearest
from tensors import groupings, noise


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.layers.11.mlp.down_proj", "model.layers.11"),
        ("transformer.h.0.attn.c_attn", "transformer.h.0"),
        ("model.layers.1.mlp.experts.3.up_proj", "model.layers.1"),
        ("layer", ""),
    ],
)
def test_a_block_ends_with_the_first_number(name: str, block: str) -> None:
    assert Layer(name=name, rows=2, columns=3).block == block


@pytest.mark.parametrize(
    ("name", "expert", "stack"),
    [
        ("model.layers.3.mlp.experts.down_proj.3", 3, "model.layers.3.mlp.experts.down_proj.*"),
        ("model.layers.3.mlp.experts.3.w1", 3, "model.layers.3.mlp.experts.*.w1"),
        ("model.layers.3.mlp.up_proj", None, None),
    ],
)
def test_a_stack_has_a_star_where_its_experts_have_their_number(
    name: str, expert: int | None, stack: str | None
) -> None:
    assert Layer(name=name, rows=2, columns=3, expert=expert).stack == stack


def test_the_average_bits_are_those_of_blocks_where_there_are_any() -> None:
    block = (Layer(name="layers.0.up", rows=4, columns=8), 8)
    other = (Layer(name="layers.1.up", rows=4, columns=24), 36)
    outside = (Layer(name="embed", rows=100, columns=8, role="tied"), 600)
    assert average_bits([block, other, outside]) == 8 * 44 / 128
    assert average_bits([outside]) == 6


def test_weights_are_all_numbers_of_the_matrix() -> None:
    assert Layer(name="layer", rows=2, columns=3).weights == 6


@pytest.mark.parametrize("zero", ["real", "integer", "symmetric"])
@pytest.mark.parametrize("stores_zero", [False, True])
def test_an_empty_layer_has_the_types_of_a_full_one(zero: Zero, stores_zero: bool) -> None:
    grid = Grid(bits=2, dtype=torch.float16, zero=zero, stores_zero=stores_zero)
    layer = StoredLayer(layer=Layer(name="layer", rows=2, columns=8), grid=grid, size=4, ordered=False)
    full = round_to_nearest(noise(0, 2, 2, 4), grid, Grouping(columns=8, size=4))
    empty = layer.empty()
    for one, other in ((empty.codes, full.codes), (empty.scale, full.scale), (empty.offset, full.offset)):
        assert (one.dtype, one.shape, one.is_meta) == (other.dtype, other.shape, True)


@given(grouping=groupings(), seed=st.integers(0, 2**16), leading=st.sampled_from([(), (3,), (2, 3)]))
def test_join_undoes_split(grouping: Grouping, seed: int, leading: tuple[int, ...]) -> None:
    x = noise(seed, *leading, grouping.columns)
    pieces = grouping.split(x)
    assert pieces.shape == (*leading, grouping.groups, grouping.size)
    assert torch.equal(grouping.join(pieces), x)


@given(grouping=groupings(), seed=st.integers(0, 2**16))
def test_filling_up_the_last_group_changes_neither_its_range_nor_its_importance(grouping: Grouping, seed: int) -> None:
    x, h = noise(seed, grouping.columns), noise(seed + 1, grouping.columns).square()
    ordered = range(grouping.columns) if grouping.order is None else grouping.order.tolist()
    last = list(ordered)[(grouping.groups - 1) * grouping.size :]
    assert grouping.split(x)[-1].aminmax() == x[last].aminmax()
    torch.testing.assert_close(grouping.split_importance(h)[-1].sum(), h[last].sum())
