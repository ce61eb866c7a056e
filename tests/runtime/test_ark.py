"""The kernels of auto-round-kernel multiply as unpacked weights do on every grid, and give all bytes back."""

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from dashq import DashqLinear, Grouping
from dashq.runtime import ark
from dashq.runtime.kernel_choice import ARK_INT8X2
from dashq.runtime.kernel_choice import KERNELS as KERNELS_BY_NAME
from kernel_layers import GRID, ROUNDING, check_product, grouped, parts, stored_layer
from tensors import noise

pytest.importorskip("auto_round_kernel")

ORDER = torch.randperm(100, generator=torch.Generator().manual_seed(0))
SHAPES = [
    (1, Grouping(columns=64, size=64)),
    (33, Grouping(columns=100, size=32)),
    (48, Grouping(columns=100, size=24, order=ORDER)),
    (80, Grouping(columns=192, size=192)),
    (100, Grouping(columns=40, size=8)),
]
KERNELS = [
    ("ark_int8", torch.bfloat16),
    ("ark_int8", torch.float32),
    ("ark_int8x2", torch.bfloat16),
    ("ark_int8x2", torch.float16),
    ("ark_int8x2", torch.float32),
    ("ark_bfloat16", torch.bfloat16),
    ("ark_float32", torch.float16),
    ("ark_float32", torch.float32),
]


def use(layer: DashqLinear, name: str, dtype: torch.dtype) -> None:
    """Let a layer use a kernel that claims it; skips where the library rounds otherwise on this processor."""
    if not KERNELS_BY_NAME[name].works(layer.stored.grid):
        pytest.skip(f"{name}: the library rounds inputs otherwise on this processor, or not at all")
    layer.use(name, dtype)
    assert layer.kernel


def allowed_error(name: str, layer: DashqLinear, x: Float[Tensor, "*batch columns"]) -> Float[Tensor, "tokens rows"]:
    """What the arithmetic's rounding of inputs and weights can make of the outputs at most.

    A step of 8 bits is a 255th of a group's range with 0. Rounding to it, and cutting off at the ends, moves an input
    by at most a step; two times leave at most that of a range of two steps.
    """
    inputs, (symmetric, _) = grouped(layer, x), parts(layer)
    span = inputs.amax(-1, keepdim=True).clamp_min(0) - inputs.amin(-1, keepdim=True).clamp_max(0)
    moved = {
        "ark_int8": (span / 255).expand_as(inputs),
        "ark_int8x2": (2 * span / 255**2).expand_as(inputs),
        "ark_bfloat16": ROUNDING[torch.bfloat16] * inputs.abs(),  # for the weight
        "ark_float32": torch.zeros_like(inputs),
    }
    return torch.einsum("tgs,rgs->tr", moved[name], symmetric.abs())


@pytest.mark.parametrize(("name", "dtype"), KERNELS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "grouping"), SHAPES)
def test_the_product_is_that_of_the_unpacked_weight(
    name: str, dtype: torch.dtype, bits: int, rows: int, grouping: Grouping
) -> None:
    if name == "ark_int8x2" and grouping.size % 32:
        grouping = Grouping(columns=grouping.columns, size=96, order=grouping.order)
    layer = stored_layer(rows, grouping, bits).to(dtype)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    use(layer, name, dtype)
    for leading in ((1,), (7,), (2, 20)):
        x = noise(3, *leading, grouping.columns).to(dtype)
        check_product(layer, x, allowed_error(name, layer, x))
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].equal(tensor) for key, tensor in before.items())


FORMATS = ["mlx", "metal", "gptq", "compressed-tensors", "dashq-packed-linear"]


@pytest.mark.parametrize("name", ["ark_int8x2", "ark_float32"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_zero_and_format_has_the_same_product(format_name: str, name: str) -> None:
    layer = stored_layer(64, Grouping(columns=128, size=64), 4, format_name)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = noise(3, 5, 128)
    use(layer, name, torch.float32)
    check_product(layer, x, allowed_error(name, layer, x))
    assert all(layer.state_dict()[key].equal(tensor) for key, tensor in before.items())


@pytest.mark.parametrize(("name", "dtype"), KERNELS)
def test_nan_comes_through_in_its_own_token_alone(name: str, dtype: torch.dtype) -> None:
    layer = stored_layer(48, Grouping(columns=64, size=32), 3).to(dtype)
    use(layer, name, dtype)
    x = noise(1, 3, 64).to(dtype)
    x[1, 5] = torch.nan
    nan = layer(x).isnan()
    assert nan[1].all()
    assert not nan[[0, 2]].any()


@pytest.mark.parametrize("name", ["ark_int8", "ark_int8x2", "ark_float32"])
def test_groups_of_zeros_and_of_one_sign_are_rounded_as_others_are(name: str) -> None:
    layer = stored_layer(48, Grouping(columns=96, size=32), 3)
    use(layer, name, torch.float32)
    x = torch.cat([torch.zeros(2, 32), noise(1, 2, 32).abs() + 3, -noise(2, 2, 32).abs() - 3], dim=-1)
    check_product(layer, x, allowed_error(name, layer, x))


def test_other_sizes_than_those_tried_are_not_claimed() -> None:
    claims = [("ark_float32", 12, 3), ("ark_int8", 12, 5), ("ark_int8x2", 48, 3)]
    for name, size, bits in claims:
        layer = stored_layer(8, Grouping(columns=96, size=size), bits)
        layer.use(name, torch.float32)
        assert layer.kernel is None


@pytest.mark.parametrize(
    ("format_name", "name", "bits_per_weight"),
    [("dashq", "ark_float32", 2.75), ("dashq", "ark_int8x2", 3.25), ("gptq", "ark_float32", 2.625)],
)
def test_scales_are_held_once_and_zeros_as_small_as_in_files(
    format_name: str, name: str, bits_per_weight: float
) -> None:
    layer = stored_layer(1536, Grouping(columns=1024, size=64), 2, format_name)
    use(layer, name, torch.float32)
    storages = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage() for buffer in layer.buffers()}
    held = sum(storage.nbytes() for storage in storages.values())
    assert 8 * held / layer.stored.layer.weights == pytest.approx(bits_per_weight, rel=0.01)


def test_inputs_come_twice_only_where_the_library_rounds_as_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ARK_INT8X2.works(GRID):
        pytest.skip("the library rounds inputs otherwise on this processor, or not at all")
    ark._rounds_as_known.cache_clear()
    monkeypatch.setattr(ark, "STEPS", 127)
    try:
        assert not ARK_INT8X2.works(GRID)
    finally:
        ark._rounds_as_known.cache_clear()
