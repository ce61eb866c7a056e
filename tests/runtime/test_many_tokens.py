"""For many tokens a layer is unpacked where that was measured to be sooner, and computes the same."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from dashq import Grouping
from dashq.runtime import many_tokens as module
from dashq.runtime.kernel_choice import KERNELS
from dashq.runtime.many_tokens import TOKENS, turning_point
from kernel_layers import stored_layer
from tensors import noise

SECONDS = st.floats(1e-6, 10.0)


@given(packed=SECONDS, plain=SECONDS, unpacking=SECONDS)
def test_from_the_turning_point_on_unpacking_takes_no_longer(packed: float, plain: float, unpacking: float) -> None:
    point = turning_point(packed, plain, unpacking)
    if packed <= plain:
        assert point == math.inf
    else:
        assert point == 2 ** round(math.log2(point)) >= 1
        for tokens in (point, 3 * point):
            assert unpacking + plain * tokens / TOKENS <= packed * tokens / TOKENS * (1 + 1e-9)
        assert point == 1 or unpacking + plain * point / 2 / TOKENS >= packed * point / 2 / TOKENS * (1 - 1e-9)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "grouping", [Grouping(columns=100, size=32), Grouping(columns=128, size=64, order=torch.randperm(128))]
)
def test_many_tokens_are_multiplied_with_the_unpacked_weight(name: str, grouping: Grouping) -> None:
    layer = stored_layer(48, grouping, 3).bfloat16()
    assert layer.bias is not None
    weight = layer.quantized().dequantize()
    if KERNELS[name].works(layer.stored.grid):
        layer.use(name, torch.bfloat16)
    if layer.kernel is None:
        pytest.skip(f"{name} does not work here")
    layer.many = 5
    x = noise(3, 5, grouping.columns).bfloat16()
    expected = functional.linear(x.float(), weight, layer.bias.float()).bfloat16()  # weights may be rounded to bfloat16
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=5e-2)
    tensors = layer.packed()
    unpacked = layer.kernel.weight(tensors, layer.stored, torch.float32)[:, : grouping.columns]
    if grouping.order is not None:
        unpacked = unpacked[:, grouping.order.argsort()]
    torch.testing.assert_close(unpacked, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lanes", "ark_bfloat16", "int4"])
@pytest.mark.parametrize("fast", [False, True])
def test_many_tokens_are_multiplied_in_float32_where_the_hardware_has_no_bfloat16(
    name: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dashq.runtime.kernels.multiplies_bfloat16", lambda device: fast)
    layer = stored_layer(48, Grouping(columns=64, size=32), 4).bfloat16()
    if KERNELS[name].works(layer.stored.grid):
        layer.use(name, torch.bfloat16)
    if layer.kernel is None:
        pytest.skip(f"{name} does not work here")
    x, dtype = noise(1, 5, 64).bfloat16(), torch.bfloat16 if fast else torch.float32
    product = layer.kernel.multiply_unpacked(x, layer.packed(), layer.stored)
    assert product.dtype == dtype
    expected = functional.linear(x.to(dtype), layer.quantized().dequantize(dtype))
    torch.testing.assert_close(product, expected, rtol=2e-2 if fast else 1e-5, atol=5e-2 if fast else 1e-5)
    layer.bias, layer.many = None, 1
    assert layer(x).equal(product.bfloat16())


def test_fewer_tokens_are_multiplied_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = stored_layer(48, Grouping(columns=64, size=32), 4).bfloat16()
    layer.use("int4", torch.bfloat16)
    assert layer.kernel
    layer.many = 3
    monkeypatch.setattr(type(layer.kernel), "weight", lambda *arguments: torch.zeros(48, 64, dtype=arguments[-1]))
    products = [layer(noise(1, tokens, 64).bfloat16()) - layer.bias for tokens in (1, 2, 3, 4)]
    assert [bool(product.any()) for product in products] == [True, True, False, False]


def test_layers_of_one_shape_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_measured", {})
    seconds = iter([3.0, 2.0, 3.0] * 2)  # packed, unpacked for one token, unpacked for all
    monkeypatch.setattr(module, "_seconds", lambda call: (call(), next(seconds))[1])
    for rows in (16, 32, 16):
        layer = stored_layer(rows, Grouping(columns=64, size=32), 4).bfloat16()
        layer.use("int4", torch.bfloat16)
        assert layer.many == TOKENS
    assert next(seconds, None) is None


@pytest.mark.parametrize(("seconds", "calls"), [([0.02, 0.01, 0.03], 3), ([2.0], 1)])
def test_short_calls_are_repeated_and_the_quickest_but_the_first_counts(
    seconds: list[float], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, left = [0.0], [0.001, *seconds]  # a first one, whose time says nothing
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    assert module._seconds(lambda: clock.__setitem__(0, clock[0] + left.pop(0))) == pytest.approx(min(seconds))
    assert len(seconds) - len(left) == calls


@pytest.mark.parametrize("name", ["lanes", "ark_float32"])
def test_a_layer_is_measured_where_it_lies_whatever_device_other_tensors_begin_on(name: str) -> None:
    kernel = KERNELS[name]
    pytest.importorskip(kernel.package or "torch")
    layer = stored_layer(24, Grouping(columns=64, size=32), 4)
    tensors = kernel.repack(layer.quantized())
    with torch.device("meta"):  # products of tensors on it and of others are refused
        assert module.many_tokens(kernel, tensors, layer.stored, torch.float32) >= 1


def test_without_a_kernel_nothing_is_measured() -> None:
    layer = stored_layer(8, Grouping(columns=64, size=32), 3)
    layer.use("exact", torch.float32)
    assert layer.many == math.inf
