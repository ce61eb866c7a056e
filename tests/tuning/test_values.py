"""What a tuner may change of a layer or norm lies on its grid, is what it was where nothing changes, and has the
gradients of the dense weights."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dashq import Grid, Grouping, Layer, PlanError, Quantized, Serializer, SuperBlocks
from dashq.data import StoredLayer
from dashq.results.convert import regrid
from dashq.solving.stored_values import store
from dashq.testing.comparison import equal, same
from dashq.testing.examples import CODEBOOK_GRIDS, block_grids, grids, quantized_layers
from dashq.tuning import values
from dashq.tuning.values import LayerValues, NormGain, values_of
from recipes import REGISTRY
from tensors import noise

FEW = settings(max_examples=15)
STEP = 2.0**-6  # of finite differences, which a linear function has exactly
K_QUANTS: dict[str, Grid] = {
    "signed super-blocks": Grid(
        bits=3,
        dtype=torch.float32,
        zero="symmetric",
        negative_scales=True,
        super_blocks=SuperBlocks(groups=4, size=8, top=31, signed=True),
    ),
    "super-blocks": Grid(bits=2, dtype=torch.float32, super_blocks=SuperBlocks(groups=4, size=8, top=15)),
    "a codebook": CODEBOOK_GRIDS[0],
    "a codebook of levels": CODEBOOK_GRIDS[-1],
}
GRIDS: Mapping[str, Grid] = K_QUANTS | {
    "real": Grid(bits=2, dtype=torch.float16),
    "real of float32": Grid(bits=3, dtype=torch.float32),
    "stored zero": Grid(bits=3, dtype=torch.float16, stores_zero=True),
    "integer": Grid(bits=4, dtype=torch.bfloat16, zero="integer"),
    "symmetric": Grid(bits=4, dtype=torch.float16, zero="symmetric"),
    "negative scales": Grid(bits=4, dtype=torch.float16, zero="symmetric", negative_scales=True),
}


def any_grid() -> st.SearchStrategy[Grid]:
    stores = st.builds(
        Grid, bits=st.integers(1, 8), dtype=st.sampled_from([torch.float16, torch.float32]), stores_zero=st.just(True)
    )
    return st.one_of(grids(), stores, blocks())


def blocks() -> st.SearchStrategy[Grid]:
    return block_grids() | st.sampled_from(CODEBOOK_GRIDS)


any_layer = any_grid().flatmap(quantized_layers)


def changed(layer: LayerValues, seed: int, size: float = 0.2) -> LayerValues:
    """The same values with changes at random, half of them 0."""
    for index, tunable in enumerate(layer.tunables):
        change = size * noise(seed + index, *tunable.parameter.shape)
        tunable.parameter.data = torch.where(noise(seed + 7 + index, *change.shape) > 0, change, 0.0)
    return layer


@FEW
@given(any_layer)
def test_without_a_change_every_number_is_what_it_was(q: Quantized) -> None:
    assert equal(values_of("layer", q).applied(q), q)


@FEW
@given(any_layer, st.integers(0, 2**16))
def test_changed_values_lie_on_the_grid_and_codes_stay(q: Quantized, seed: int) -> None:
    tuned = changed(values_of("layer", q), seed).applied(q)
    assert tuned.codes is q.codes
    assert (tuned.scale.dtype, tuned.offset.dtype) == (q.scale.dtype, q.offset.dtype)
    assert equal(regrid(tuned, q.grid), tuned)
    if not q.grid.super_blocks:
        scale, offset = store(tuned.scale.float(), tuned.offset.float(), q.grid)
        assert equal(scale.to(q.scale.dtype), tuned.scale)
        assert equal(offset.to(q.offset.dtype), tuned.offset)


@FEW
@given(any_layer, st.integers(0, 2**16))
def test_tuned_values_are_where_another_tuning_begins(q: Quantized, seed: int) -> None:
    tuned = changed(values_of("layer", q), seed).applied(q)
    assert equal(values_of("layer", tuned).applied(tuned), tuned)


@FEW
@given(grids(("integer", "symmetric")).flatmap(quantized_layers), st.integers(0, 2**16))
def test_zeros_that_are_codes_stay(q: Quantized, seed: int) -> None:
    layer = changed(values_of("layer", q), seed)
    assert [tunable.kind for tunable in layer.tunables] == ["scale"]
    assert layer.applied(q).zeros.equal(q.zeros)


@FEW
@given(grids(("real",)).flatmap(quantized_layers), st.integers(0, 2**16))
def test_scale_and_offset_are_the_nearest_that_the_type_holds(q: Quantized, seed: int) -> None:
    layer = changed(values_of("layer", q), seed, size=0.05)
    a, b = (tunable.parameter.detach() for tunable in layer.tunables)
    scale, offset = q.scale.float(), q.offset.float()
    tuned = layer.applied(q)
    assert tuned.scale.equal((scale * (1 + a / (q.grid.top / 2))).to(q.scale.dtype))
    assert tuned.offset.equal((offset + (b - a) * scale).to(q.offset.dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_changes_of_scales_and_offsets_count_in_steps(bits: int) -> None:
    """A change of the scale moves the outermost codes' weights by as many steps, apart, and the middle by none."""
    q = layer_on(Grid(bits=bits, dtype=torch.float32), 64, 8, ordered=False)
    layer = values_of("layer", q)
    for tunable, expected in zip(layer.tunables, [(-0.25, 0.0, 0.25), (0.25, 0.25, 0.25)], strict=True):
        tunable.parameter.data.fill_(0.25)
        scale, offset = layer.values()
        for code, steps in zip((0, q.grid.top / 2, q.grid.top), expected, strict=True):
            moved = (scale * code + offset - q.scale * code - q.offset) / q.scale
            torch.testing.assert_close(moved, torch.full_like(moved, steps), rtol=0, atol=2e-5 * 2**bits)
        tunable.parameter.data.zero_()


@FEW
@given(blocks().flatmap(quantized_layers), st.integers(0, 2**16))
def test_whole_multiples_of_units_stay(q: Quantized, seed: int) -> None:
    blocks = q.grid.super_blocks
    assert blocks
    layer = changed(values_of("layer", q), seed, size=0.05)
    tuned = layer.applied(q)
    kinds = ["scale", "offset"] if blocks.has_offsets else ["scale"]
    assert [tunable.kind for tunable in layer.tunables] == kinds
    for old, new in [(q.scale, tuned.scale), (q.offset, tuned.offset)][: len(kinds)]:
        old, new = old.reshape(-1, blocks.groups), new.reshape(-1, blocks.groups)
        torch.testing.assert_close(old * new[:, :1], new * old[:, :1], rtol=1e-5, atol=0)


def dense(q: Quantized, a: Tensor, b: Tensor) -> Tensor:
    """The weights in float64 by definition: a scale s becomes s (1 + a / h), with h for half of the largest code.

    An offset m becomes m - a s + b s where the zero is real; a zero that is a code stays.
    """
    scale, offset = q.scale.double(), q.offset.double()
    half = q.grid.top / 2
    if q.grid.super_blocks:
        groups = q.grid.super_blocks.groups
        a, b = (change.repeat_interleave(groups, 1).reshape(scale.shape) / half for change in (a, b))
        new_scale, new_offset = scale * (1 + a), offset * (1 + (b if q.grid.super_blocks.has_offsets else a))
    else:
        new_scale = scale * (1 + a / half)
        new_offset = offset + (b - a) * scale if q.grid.zero == "real" else offset * (1 + a / half)
    return q.grouping.join(q.numbers(q.codes).double() * new_scale[..., None] + new_offset[..., None])


def differences(q: Quantized, loss: Callable[[Tensor], Tensor], shapes: list[torch.Size]) -> list[Tensor]:
    """Derivatives of the loss of the dense weights by each change, as central differences."""
    zeros = [torch.zeros(shapes[0], dtype=torch.float64) for _ in range(2)]
    derivatives = []
    for kind, shape in enumerate(shapes):
        derivative = torch.zeros(shape, dtype=torch.float64)
        for place in torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, 2).tolist():
            step = torch.zeros(shape, dtype=torch.float64)
            step[tuple(place)] = STEP
            ahead, behind = (
                loss(dense(q, *(zero + sign * step if kind == own else zero for own, zero in enumerate(zeros))))
                for sign in (1, -1)
            )
            derivative[tuple(place)] = (ahead - behind) / (2 * STEP)
        derivatives.append(derivative)
    return derivatives


def layer_on(grid: Grid, columns: int, size: int, ordered: bool, rows: int = 2) -> Quantized:
    """Rows with any numbers of the grid."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(5)) if ordered else None
    grouping = Grouping(columns=columns, size=size, order=order)
    codes = torch.randint(grid.top + 1, (rows, grouping.groups, size), generator=torch.Generator().manual_seed(6))
    scale, offset = noise(7, 2, rows, grouping.groups)
    scale = scale if grid.negative_scales else scale.abs() + 0.1
    offset = -scale * (codes[..., 0] if grid.zero == "integer" else offset.abs())
    return Quantized.of(codes.byte(), *store(scale, offset, grid), grouping, grid)


def formats() -> Iterator[tuple[Serializer, Grid, int]]:
    """Every default format with each grid and group size in which it holds 256 columns."""
    for cls in REGISTRY.serializers.values():
        for bits, size in itertools.product(range(1, 9), (16, 32, 64, 128)):
            with suppress(PlanError):
                serializer = cls()
                grid = serializer.grid(bits)
                stored = StoredLayer(
                    layer=Layer(name="layer", rows=32, columns=256), grid=grid, size=size, ordered=False
                )
                serializer.pack(stored.empty())
                yield serializer, grid, size


def test_every_format_holds_tuned_layers() -> None:
    held = set()
    for serializer, grid, size in formats():
        q = layer_on(grid, 256, size, ordered=False, rows=32)
        tuned = changed(values_of("layer", q), grid.bits, size=0.05).applied(q)
        again = serializer.unpack(serializer.pack(tuned), 256, size, grid)
        assert same(again, tuned), (serializer, grid, size)
        held.add(serializer.name)
    assert held == REGISTRY.serializers.keys()


@pytest.mark.parametrize("ordered", [False, True], ids=["in place", "reordered"])
@pytest.mark.parametrize("columns", [64, 52], ids=["even groups", "a short last group"])
@pytest.mark.parametrize("name", GRIDS)
def test_gradients_are_those_of_the_dense_weights(name: str, columns: int, ordered: bool) -> None:
    grid = GRIDS[name]
    if grid.super_blocks and (columns % grid.super_blocks.columns or ordered):
        pytest.skip("super-blocks are whole, and in place")
    q = layer_on(grid, columns, 8, ordered)
    layer = values_of("layer", q)
    target = noise(8, 2, columns).double()

    def loss(weight: Tensor) -> Tensor:
        return (weight - target).square().sum()

    layer.add_gradient((2 * (q.dequantize().double() - target)).float(), q)
    expected = differences(q, loss, [tunable.parameter.shape for tunable in layer.tunables])
    for tunable, derivative in zip(layer.tunables, expected, strict=True):
        assert tunable.parameter.grad is not None
        torch.testing.assert_close(tunable.parameter.grad.double(), derivative, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_pass_the_rounding_as_if_it_was_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, gradient = layer_on(GRIDS[name], 64, 8, ordered=False), noise(9, 2, 64)
    rounded, exact = (changed(values_of("layer", q), 3, size=0.01) for _ in range(2))
    rounded.add_gradient(gradient, q)
    monkeypatch.setattr(values, "_straight_through", lambda value, stored: value)
    exact.add_gradient(gradient, q)
    for one, other in zip(rounded.tunables, exact.tunables, strict=True):
        assert one.parameter.grad is not None
        assert other.parameter.grad is not None
        assert one.parameter.grad.equal(other.parameter.grad)


def test_gradients_add_up_also_where_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, gradient = layer_on(GRIDS["real"], 52, 8, ordered=True), noise(9, 2, 52)
    at_once, in_parts = values_of("layer", q), values_of("layer", q)
    at_once.add_gradient(2 * gradient, q)
    monkeypatch.setattr(values, "CACHED", 1)
    in_parts.add_gradient(gradient, q)
    in_parts.add_gradient(gradient, q)
    for one, other in zip(at_once.tunables, in_parts.tunables, strict=True):
        torch.testing.assert_close(one.parameter.grad, other.parameter.grad)


def test_only_what_is_to_learn_has_gradients() -> None:
    q = layer_on(GRIDS["real"], 64, 8, ordered=False)
    layer = values_of("layer", q)
    scale, offset = (tunable.parameter for tunable in layer.tunables)
    assert layer.learns
    scale.requires_grad_(False)
    assert layer.learns
    layer.add_gradient(noise(9, 2, 64), q)
    assert scale.grad is None
    assert offset.grad is not None
    offset.requires_grad_(False)
    assert not layer.learns


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["ordinary", "zero"])
def test_a_gain_changes_in_shares_of_all_gains_size(name: str, dtype: torch.dtype) -> None:
    gain = (torch.zeros(48) if name == "zero" else 1 + 0.1 * noise(1, 48)).to(dtype)
    norm = NormGain("norm", gain)
    assert norm.applied().equal(gain)
    assert norm.applied().dtype is dtype
    size = gain.float().square().mean().sqrt() if gain.any() else torch.tensor(1.0)
    gradient, change = noise(2, 48), 0.1 * noise(3, 48)
    norm.add_gradient(gradient)
    norm.add_gradient(gradient)
    torch.testing.assert_close(norm.tunable.parameter.grad, 2 * gradient * size)
    norm.tunable.parameter.data = change
    assert norm.applied().equal((gain.float() + change * size).to(dtype))
    assert norm.value().equal(norm.applied().float())
    assert norm.learns
    norm.tunable.parameter.requires_grad_(False)
    assert not norm.learns
