"""Scales and offsets are stored as the nearest numbers that a grid holds."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dashq import Grid
from dashq.data import Zero
from dashq.solving.stored_values import store

DTYPES = st.sampled_from([torch.float16, torch.bfloat16])
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


def kept(scale: float, offset: float, grid: Grid) -> tuple[float, float]:
    """Scale and offset as the grid stores them."""
    s, m = store(torch.tensor([[scale]]), torch.tensor([[offset]]), grid)
    return float(s), float(m)


@st.composite
def near_a_number_of(draw: st.DrawFn, dtype: torch.dtype) -> float:
    """A float32 near a number of the type, on it, or half way between two."""
    bits, next_bits = (torch.tensor(draw(st.integers(0, 0x7BFE)) + one, dtype=torch.int16) for one in (0, 1))
    low, high = (float(x.view(dtype)) for x in (bits, next_bits))
    value = draw(st.sampled_from([low, (low + high) / 2, (low + high) / 2 * (1 + 2**-22)]))
    return draw(st.sampled_from([value, -value]))


@given(st.data(), DTYPES)
def test_a_stored_number_is_the_nearest_that_its_type_holds_and_never_infinite(
    data: st.DataObject, dtype: torch.dtype
) -> None:
    grid, limit = Grid(bits=4, dtype=dtype), torch.finfo(dtype).max
    value = torch.tensor(data.draw(NUMBERS | near_a_number_of(dtype)))
    _, offset = kept(1.0, float(value), grid)
    assert offset == float(value.clamp(-limit, limit).to(dtype))
    assert kept(1.0, offset, grid) == (1.0, offset)


@given(st.floats(-1, 2.0**100, width=32), DTYPES, st.sampled_from(["real", "integer", "symmetric"]))
def test_a_stored_scale_is_positive_and_normal(value: float, dtype: torch.dtype, zero: Zero) -> None:
    scale, _ = kept(value, 0.0, Grid(bits=4, dtype=dtype, zero=zero))
    assert torch.finfo(dtype).smallest_normal <= scale <= torch.finfo(dtype).max
    assert scale == float(torch.tensor(scale).to(dtype))


@given(st.floats(-4, 4, width=32), st.integers(1, 8), DTYPES)
def test_a_negative_scale_is_kept_where_the_grid_has_them(value: float, bits: int, dtype: torch.dtype) -> None:
    grid = Grid(bits=bits, dtype=dtype, zero="symmetric", negative_scales=True)
    scale, offset = kept(value, 1.0, grid)
    assert scale != 0
    assert scale * value >= 0
    assert offset == -scale * grid.middle


@given(st.floats(2.0**-10, 4, width=32), st.floats(-100, 100, width=32), st.integers(1, 8), DTYPES)
def test_a_whole_zero_is_the_nearest_code_and_stays_it(
    scale: float, offset: float, bits: int, dtype: torch.dtype
) -> None:
    grid = Grid(bits=bits, dtype=dtype, zero="integer")
    s, m = kept(scale, offset, grid)
    zero = -m / s
    assert zero == round(zero)
    assert abs(zero - min(max(-offset / s, 0), grid.top)) <= 0.5 + 1e-4 * grid.top
    assert kept(s, m, grid) == (s, m)
