"""The scales and offsets of a super-block are whole multiples of one float16 unit, the nearest that there are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Grid, SuperBlocks
from dashq.solving.stored_values import store
from dashq.solving.super_blocks import LARGEST_UNIT, SMALLEST_UNIT, as_unit, factor, on_unit, store_in_blocks
from dashq_plugins.formats.gguf.blocks import named
from recipes import REGISTRY
from tensors import noise

ROWS = 3
SUPER_BLOCKS = (*(REGISTRY.serializers["gguf"]().grid(bits) for bits in (2, 3, 4)), named("IQ2_S").grid)
GRIDS = st.sampled_from(SUPER_BLOCKS)
SEEDS = st.integers(0, 2**16)
POWERS = st.integers(-12, 12)
KINDS = [grid.super_blocks for grid in SUPER_BLOCKS if grid.super_blocks]
few = settings(max_examples=60)


def blocks_of(grid: Grid) -> SuperBlocks:
    assert grid.super_blocks
    return grid.super_blocks


def wanted(grid: Grid, seed: int, power: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets of two super-blocks a row that no file holds, as solvers and min-max rounding want them."""
    scale, offset = 2.0**power * noise(seed, 2, ROWS, 2 * blocks_of(grid).groups)
    return scale if grid.negative_scales else scale.abs(), offset


def multiples(blocks: SuperBlocks) -> Tensor:
    """The whole numbers that a scale can be of its unit."""
    numbers = torch.arange(-blocks.top - 1 if blocks.signed else 1, blocks.top + 1)
    return numbers[(numbers % 2 == 1) if blocks.odd else (numbers != 0)].float()


@few
@given(GRIDS, SEEDS, POWERS)
def test_what_is_stored_can_be_written_and_is_stored_again_unchanged(grid: Grid, seed: int, power: int) -> None:
    blocks = blocks_of(grid)
    scale, offset = store_in_blocks(*wanted(grid, seed, power), grid)
    numbers = [(scale, False), (-offset, False)] if blocks.has_offsets else [(scale, blocks.signed)]
    for values, signed in numbers:
        parts = values.unflatten(1, (-1, blocks.groups)).flatten(0, 1)
        unit, multiple = factor(parts, blocks, signed)
        assert (unit.float() * multiple).equal(parts)
    again = store_in_blocks(scale, offset, grid)
    assert again[0].equal(scale)
    assert again[1].equal(offset)
    through_grid = store(scale, offset, grid)
    assert through_grid[0].equal(scale)
    assert through_grid[1].equal(offset)


@few
@given(GRIDS, SEEDS, POWERS)
def test_the_largest_scale_takes_the_last_multiple_and_all_others_the_nearest(
    grid: Grid, seed: int, power: int
) -> None:
    blocks = blocks_of(grid)
    scale, offset = wanted(grid, seed, power)
    stored = store_in_blocks(scale, offset, grid)[0].unflatten(1, (-1, blocks.groups))
    parts = scale.unflatten(1, (-1, blocks.groups))
    largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    unit = as_unit(-largest / (blocks.top + 1) if blocks.signed else largest / blocks.top)
    choices = unit[..., None] * multiples(blocks)  # [rows blocks 1 multiples]
    nearest = (parts[..., None] - choices).abs().amin(-1)
    assert bool(((parts - stored).abs() <= nearest + 1e-6 * largest.abs()).all())
    if bool((unit.abs() > SMALLEST_UNIT).all()):
        last = stored.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(last, largest.abs(), rtol=2**-11, atol=0)


@few
@given(GRIDS, SEEDS, POWERS)
def test_offsets_are_those_of_a_code_or_the_nearest_multiples_below_zero(grid: Grid, seed: int, power: int) -> None:
    blocks = blocks_of(grid)
    scale, offset = wanted(grid, seed, power)
    stored_scale, stored = store_in_blocks(scale, offset, grid)
    if not blocks.has_offsets:
        assert stored.equal(-stored_scale * grid.middle)
        return
    assert bool((stored <= 0).all())
    parts = (-offset).clamp_min(0).unflatten(1, (-1, blocks.groups))
    unit = as_unit(parts.amax(-1, keepdim=True) / blocks.top)
    nearest = (parts[..., None] - unit[..., None] * torch.arange(blocks.top + 1)).abs().amin(-1)
    error = (parts + stored.unflatten(1, (-1, blocks.groups))).abs()
    assert bool((error <= nearest + 1e-6 * parts.amax()).all())


@pytest.mark.parametrize("grid", SUPER_BLOCKS, ids=lambda grid: f"{grid.bits} bits")
def test_weights_that_are_all_zero_have_the_smallest_unit(grid: Grid) -> None:
    nothing = torch.zeros(1, blocks_of(grid).groups)
    scale, offset = store_in_blocks(nothing, nothing, grid)
    assert bool((scale.abs() == SMALLEST_UNIT).all())
    assert offset.equal(-scale * grid.middle if not blocks_of(grid).has_offsets else nothing)


@given(st.floats(-1e6, 1e6, width=32))
def test_a_unit_is_the_nearest_float16_that_is_neither_zero_nor_infinite_and_keeps_its_sign(value: float) -> None:
    x = torch.tensor(value)
    unit = as_unit(x)
    assert unit.equal(unit.half().float())
    assert SMALLEST_UNIT <= abs(float(unit)) <= LARGEST_UNIT
    assert bool(torch.signbit(unit) == torch.signbit(x))
    if SMALLEST_UNIT <= abs(value) <= LARGEST_UNIT:
        assert unit == x.half().float()


@few
@given(st.sampled_from(KINDS), SEEDS, st.sampled_from([0.1, 1.0, 30.0]))
def test_a_scale_on_a_given_unit_is_the_nearest_allowed_multiple_and_never_zero(
    blocks: SuperBlocks, seed: int, spread: float
) -> None:
    unit = as_unit(noise(seed, 4, 1)) if blocks.signed else as_unit(noise(seed, 4, 1).abs())
    scale = spread * unit.abs() * noise(seed + 1, 4, blocks.groups)
    stored = on_unit(scale, unit, blocks)
    choices = unit * multiples(blocks)
    assert bool((stored[..., None] == choices[:, None]).any(-1).all())
    nearest = (scale[..., None] - choices[:, None]).abs().amin(-1)
    assert bool(((scale - stored).abs() <= nearest + 1e-6 * unit.abs()).all())


@few
@given(st.sampled_from(KINDS), st.booleans(), SEEDS)
def test_products_are_factored_into_units_and_whole_numbers(blocks: SuperBlocks, zeros: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lowest = -blocks.top - 1 if blocks.signed else 0
    number = torch.randint(lowest, blocks.top + 1, (5, blocks.groups), generator=generator)
    number = number | 1 if blocks.odd else number
    unit = as_unit(noise(seed, 5, 1).abs() + 1e-3)
    values = unit * number
    if zeros and not blocks.odd:
        values[2] = 0
    found, multiple = factor(values, blocks, blocks.signed)
    assert found.dtype == torch.float16
    assert (found.float() * multiple).equal(values)
    assert int(multiple.max()) <= blocks.top
    assert int(multiple.min()) >= lowest


@pytest.mark.parametrize("blocks", KINDS, ids=str)
def test_what_has_no_unit_in_common_is_refused(blocks: SuperBlocks) -> None:
    values = torch.ones(2, blocks.groups)
    values[1, 0] = 1 + 2**-12
    with pytest.raises(ValueError, match=r"^the scales and offsets of a super-block are no multiples of one float16"):
        factor(values, blocks, blocks.signed)
    values[1, 0] = blocks.top + 2  # times a unit of 1, which is not allowed, and no other unit serves
    with pytest.raises(ValueError, match="float16 unit"):
        factor(values, blocks, blocks.signed)


def test_negative_values_are_only_factored_where_they_may_be() -> None:
    blocks = SuperBlocks(groups=2, size=16, top=15)
    with pytest.raises(ValueError, match="float16 unit"):
        factor(torch.tensor([[1.0, -1.0]]), blocks)
    unit, multiple = factor(torch.tensor([[1.0, -1.0]]), blocks, signed=True)
    assert (unit.float() * multiple).tolist() == [[1.0, -1.0]]


def test_multiples_reach_one_further_below_zero_than_above() -> None:
    blocks = SuperBlocks(groups=3, size=16, top=31, signed=True)
    unit, multiple = factor(torch.tensor([[-32.0, 31.0, 1.0]]), blocks, signed=True)
    assert (unit.item(), multiple.tolist()) == (1, [[-32, 31, 1]])
    with pytest.raises(ValueError, match="float16 unit"):
        factor(torch.tensor([[-32.0, 32.0, 1.0]]), blocks, signed=True)
