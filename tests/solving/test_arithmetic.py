"""The arithmetic that solvers share: importances, rounding, and errors."""

import contextlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashq import Diagonal, Full, Grid, Grouping, PlanError
from dashq.curvature import Coupled
from dashq.data import Zero
from dashq.solving.arithmetic import (
    IMPORTANCE_FLOOR,
    encode,
    group_importance,
    groups_below_scales,
    groups_without_importance,
    minmax_parameters,
    quantized,
    round_to_nearest,
    weighted_error,
    zeros_where_nearer,
)
from dashq.solving.stored_values import store
from recipes import REGISTRY
from tensors import groupings, noise

DTYPES = st.sampled_from([torch.float16, torch.bfloat16])


@given(grouping=groupings(), seed=st.integers(0, 2**16))
def test_importances_follow_their_columns_and_sum_to_one_in_each_group(grouping: Grouping, seed: int) -> None:
    h = noise(seed, grouping.columns).square()
    importance = group_importance(Diagonal(h), grouping)
    torch.testing.assert_close(importance.sum(-1), torch.ones(grouping.groups))
    pieces = grouping.split_importance(h)
    assert float((importance - pieces / pieces.sum(-1, keepdim=True)).abs().max()) <= IMPORTANCE_FLOOR
    assert bool((grouping.join(importance) > 0).all())
    filling = grouping.split_importance(torch.ones(grouping.columns)) == 0
    assert not importance[filling].any()


@given(seed=st.integers(0, 2**16), power=st.integers(-60, 60))
def test_the_scale_of_importances_does_not_matter(seed: int, power: int) -> None:
    grouping = Grouping(columns=32, size=8)
    h = noise(seed, 32).square() + 1e-3
    assert torch.equal(group_importance(Diagonal(h), grouping), group_importance(Diagonal(h * 2.0**power), grouping))


def test_columns_and_groups_without_importance_still_count_a_little() -> None:
    h = torch.tensor([0.0, 4.0, 0.0, 0.0, 1.0, 1.0])
    grouping = Grouping(columns=6, size=2)
    importance = group_importance(Diagonal(h), grouping)
    assert 0 < float(importance[0, 0]) < 1e-3 < float(importance[0, 1])
    assert torch.equal(importance[1], torch.tensor([0.5, 0.5]))
    assert groups_without_importance(Diagonal(h), grouping) == 1


def test_a_full_curvature_weighs_columns_by_its_diagonal() -> None:
    x = noise(0, 20, 8)
    full, grouping = Full(x.T @ x), Grouping(columns=8, size=4)
    expected = group_importance(Diagonal(x.square().sum(0)), grouping)
    torch.testing.assert_close(group_importance(full, grouping), expected)


@given(seed=st.integers(0, 2**16), bits=st.integers(1, 8), scale=st.floats(1e-3, 3), offset=st.floats(-3, 3))
def test_encode_finds_the_nearest_point_of_the_grid(seed: int, bits: int, scale: float, offset: float) -> None:
    grid = Grid(bits=bits, dtype=torch.float16)
    w, s, m = noise(seed, 2, 3, 4), torch.full((2, 3), scale), torch.full((2, 3), offset)
    points = s[0, 0] * torch.arange(grid.top + 1) + m[0, 0]
    best = (w[..., None] - points).abs().amin(-1)
    codes = encode(w, s, m, grid)
    assert torch.equal(codes, codes.round())
    assert bool(((codes >= 0) & (codes <= grid.top)).all())
    torch.testing.assert_close((w - (s[..., None] * codes + m[..., None])).abs(), best, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 2**16), bits=st.integers(1, 8), symmetric=st.booleans())
def test_min_max_rounding_on_a_grid_with_a_code_for_0_reproduces_0(seed: int, bits: int, symmetric: bool) -> None:
    grid = Grid(bits=bits, dtype=torch.float16, zero="symmetric" if symmetric else "integer")
    weight = noise(seed, 5, 24)
    weight[:, ::3] = 0
    result = round_to_nearest(Grouping(columns=24, size=8).split(weight), grid, Grouping(columns=24, size=8))
    assert bool((result.dequantize()[:, ::3] == 0).all())
    assert result.zeros.equal(result.zeros.round())
    assert result.offset.dtype == torch.float32


@given(seed=st.integers(0, 2**16), bits=st.integers(1, 8), dtype=DTYPES)
def test_min_max_rounding_spans_each_group_and_errs_by_half_a_step(seed: int, bits: int, dtype: torch.dtype) -> None:
    grid, grouping = Grid(bits=bits, dtype=dtype), Grouping(columns=24, size=8)
    weight = noise(seed, 5, 24)
    w = grouping.split(weight)
    scale, offset = minmax_parameters(w, grid)
    # Stored in few digits.
    digits = 2 * torch.finfo(dtype).eps * (w.abs().amax(-1) + grid.top * scale)
    assert bool(((offset - w.amin(-1)).abs() <= digits).all())
    assert bool(((offset + grid.top * scale - w.amax(-1)).abs() <= digits).all())
    result = round_to_nearest(w, grid, grouping)
    assert (result.scale.dtype, result.offset.dtype) == (dtype, dtype)
    # Half a step, and what storing scale and offset in few digits moves the ends of the grid.
    slack = torch.finfo(dtype).eps * (grid.top * scale + offset.abs()) + 1e-6
    error = (grouping.split(result.dequantize()) - w).abs()
    assert bool((error <= (0.5 * scale * (1 + torch.finfo(dtype).eps) + slack)[..., None]).all())


@given(grouping=groupings(), seed=st.integers(0, 2**16), bits=st.integers(1, 8))
def test_the_quantized_weight_is_scale_times_code_plus_offset(grouping: Grouping, seed: int, bits: int) -> None:
    grid = Grid(bits=bits, dtype=torch.float16)
    w = grouping.split(noise(seed, 3, grouping.columns))
    scale, offset = store(noise(seed + 1, 3, grouping.groups).abs(), noise(seed + 2, 3, grouping.groups), grid)
    result = quantized(w, scale, offset, grid, grouping)
    expected = grouping.join(scale[..., None] * result.codes.float() + offset[..., None])
    torch.testing.assert_close(result.dequantize(), expected)


@given(seed=st.integers(0, 2**16))
def test_the_weighted_error_is_relative_and_sees_the_importances(seed: int) -> None:
    weight, wrong = noise(seed, 3, 8), noise(seed + 1, 3, 8)
    h = noise(seed + 2, 8).square() + 0.1
    assert weighted_error(weight, weight, Diagonal(h)) == 0
    assert weighted_error(weight, torch.zeros_like(weight), Diagonal(h)) == pytest.approx(1)
    x = noise(seed + 3, 1000, 8)  # with the whole second moment this is the error of the layer's output
    diagonal = Diagonal(x.square().mean(0))
    expected = ((weight - wrong).square() * diagonal.values).sum() / (weight.square() * diagonal.values).sum()
    assert weighted_error(weight, wrong, diagonal) == pytest.approx(float(expected), rel=1e-4)
    assert weighted_error(weight, wrong, Diagonal(7 * diagonal.values)) == pytest.approx(float(expected), rel=1e-4)


def test_a_layer_that_matters_to_nothing_has_no_error() -> None:
    assert weighted_error(torch.zeros(2, 4), torch.ones(2, 4), Diagonal(torch.ones(4))) == 0
    assert weighted_error(torch.ones(2, 4), torch.zeros(2, 4), Diagonal(torch.zeros(4))) == 0


def grids_of_formats() -> dict[str, Grid]:
    """Every grid of the installed formats, at each number of bits that it has, by name."""
    grids = {}
    for name, serializer in REGISTRY.serializers.items():
        for bits in range(1, 9):
            with contextlib.suppress(PlanError):
                grids[f"{name} {bits}"] = serializer().grid(bits)
    return grids


GRIDS = grids_of_formats()


@pytest.mark.parametrize("solver", sorted(REGISTRY.solvers))
@settings(max_examples=20)
@given(name=st.sampled_from(sorted(GRIDS)), seed=st.integers(0, 2**16), power=st.floats(-8, 4.2))
def test_a_layer_of_any_size_is_never_worse_than_zeros(solver: str, name: str, seed: int, power: float) -> None:
    grid, chosen = GRIDS[name], REGISTRY.solvers[solver]()
    blocks = grid.super_blocks
    grouping = Grouping(columns=blocks.columns, size=blocks.size) if blocks else Grouping(columns=16, size=8)
    if chosen.supports_super_blocks != (blocks is not None):
        return
    try:
        chosen.check(grouping.size, grid)
    except PlanError:
        return
    weight = (noise(seed, 2, grouping.columns) * 10**power).clamp(-65504, 65504)
    diagonal = Diagonal(noise(seed + 1, grouping.columns).exp())
    curvature = Full(torch.diag(diagonal.diagonal())) if issubclass(chosen.needs, Coupled) else diagonal
    layer = zeros_where_nearer(weight, chosen.solve(weight, curvature, grouping, grid), curvature)
    assert weighted_error(weight, layer.dequantize(), curvature) <= 1 + 1e-6
    assert bool(layer.scale.isfinite().all())
    assert bool(layer.offset.isfinite().all())


@pytest.mark.parametrize("zero", ["real", "integer", "symmetric"])
def test_zeros_take_the_place_of_groups_below_the_scales_alone(zero: Zero) -> None:
    grid, grouping = Grid(bits=3, dtype=torch.float16, zero=zero), Grouping(columns=24, size=8)
    weight = noise(0, 4, 24)
    weight[:, 8:16] = 3e-6 + 1e-7 * weight[:, 8:16]
    curvature = Diagonal(torch.ones(24))
    plain = round_to_nearest(grouping.split(weight), grid, grouping)
    wrong = replace(plain, codes=plain.codes.clone())
    wrong.codes[:2, 1] = 7
    layer = zeros_where_nearer(weight, wrong, curvature)
    assert not layer.dequantize()[:2, 8:16].any()
    assert layer.codes[2:, 1].equal(wrong.codes[2:, 1])
    others = [0, 2]
    assert layer.dequantize().view(4, 3, 8)[:, others].equal(wrong.dequantize().view(4, 3, 8)[:, others])
    assert groups_below_scales(weight, grouping, grid) == 4


def test_groups_of_one_value_are_not_below_the_scales() -> None:
    weight = torch.full((2, 16), 1e-6)
    assert groups_below_scales(weight, Grouping(columns=16, size=8), Grid(bits=4, dtype=torch.float16)) == 0
    assert groups_below_scales(weight, Grouping(columns=16, size=8), Grid(bits=4, dtype=torch.bfloat16)) == 0
