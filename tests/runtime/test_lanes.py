"""The kernel of lanes multiplies as unpacked weights do in float32 on every grid, and gives all bytes back."""

import copy
import logging
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.func import functional_call

from dashq import DashqLinear, Grouping
from dashq.runtime import lanes
from kernel_layers import check_product, stored_layer
from tensors import noise

pytest.importorskip("numba")

ORDER = torch.randperm(100, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(
    ("rows", "grouping"),
    [
        (1, Grouping(columns=64, size=64)),
        (64, Grouping(columns=192, size=192)),
        (100, Grouping(columns=40, size=8)),
        (130, Grouping(columns=100, size=24, order=ORDER)),
    ],
)
def test_the_product_is_that_of_the_unpacked_weight(
    dtype: torch.dtype, bits: int, rows: int, grouping: Grouping
) -> None:
    layer = stored_layer(rows, grouping, bits).to(dtype)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.use("lanes", dtype)
    assert layer.kernel
    for leading in ((1,), (7,), (2, 20)):
        x = noise(3, *leading, grouping.columns).to(dtype)
        check_product(layer, x, torch.zeros(x[..., 0].numel(), rows).double())
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].dtype == tensor.dtype and after[key].equal(tensor) for key, tensor in before.items())


FORMATS = ["mlx", "metal", "gptq", "compressed-tensors", "dashq-packed-linear"]


@pytest.mark.parametrize("format_name", FORMATS)
def test_every_zero_and_format_has_the_same_product(format_name: str) -> None:
    layer = stored_layer(64, Grouping(columns=128, size=64), 4, format_name)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.use("lanes", torch.float32)
    check_product(layer, noise(3, 5, 128), torch.zeros(5, 64).double())
    assert all(layer.state_dict()[key].equal(tensor) for key, tensor in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_comes_through_in_its_own_token_alone(dtype: torch.dtype) -> None:
    layer = stored_layer(48, Grouping(columns=64, size=32), 3).to(dtype)
    layer.use("lanes", dtype)
    assert layer.kernel
    x = noise(1, 3, 64).to(dtype)
    x[1, 5] = torch.nan
    nan = layer(x).isnan()
    assert nan[1].all()
    assert not nan[[0, 2]].any()


@pytest.mark.parametrize(("format_name", "bits", "bits_per_weight"), [("dashq", 2, 2.5), ("gptq", 3, 3.375)])
def test_memory_is_that_of_the_file(format_name: str, bits: int, bits_per_weight: float) -> None:
    layer = stored_layer(1536, Grouping(columns=1024, size=64), bits, format_name)
    layer.use("lanes", torch.float32)
    assert layer.kernel
    held = sum(buffer.nbytes for buffer in layer.buffers())
    assert 8 * held / layer.stored.layer.weights == pytest.approx(bits_per_weight, rel=0.01)


def test_groups_of_other_sizes_and_other_types_are_not_claimed() -> None:
    for size, dtype in ((12, torch.float32), (16, torch.float64)):
        layer = stored_layer(8, Grouping(columns=96, size=size), 3)
        layer.use("lanes", dtype)
        assert layer.kernel is None


def test_one_thread_and_two_give_the_same_bytes() -> None:
    layer = stored_layer(200, Grouping(columns=64, size=32), 2)
    layer.use("lanes", torch.float32)
    x, threads, outputs = noise(1, 3, 64), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            outputs.append(layer(x))
    finally:
        torch.set_num_threads(threads)
    assert outputs[0].equal(outputs[1])


def test_threads_that_multiply_at_once_do_not_disturb_each_other() -> None:
    layer = stored_layer(200, Grouping(columns=64, size=32), 2)
    layer.use("lanes", torch.float32)
    inputs = [noise(seed, 3, 64) for seed in range(16)]
    expected = [layer(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(found.equal(known) for found, known in zip(pool.map(layer, inputs), expected, strict=True))


def test_a_wide_layer_that_is_unpacked_in_parts_has_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = stored_layer(200, Grouping(columns=100, size=24), 3)
    layer.use("lanes", torch.float32)
    layer.many, x = 1, noise(1, 5, 100)
    expected = layer(x)
    monkeypatch.setattr("dashq.runtime.lanes.AT_ONCE", 1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_outputs_lie_in_one_piece() -> None:
    layer = stored_layer(100, Grouping(columns=64, size=32), 2)
    layer.bias = None
    layer.use("lanes", torch.float32)
    assert layer(noise(1, 3, 64)).is_contiguous()


def test_the_product_is_with_the_tensors_that_the_layer_has_now() -> None:
    layer = stored_layer(100, Grouping(columns=64, size=32), 2)
    layer.use("lanes", torch.float32)
    layer.bias = None
    expected = layer(x := noise(1, 3, 64))
    twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    doubled = {name: 2 * layer.get_buffer(name) for name in ("scale", "offset")}
    assert functional_call(layer, doubled, (x,)).equal(2 * expected)
    layer.get_buffer("scale").share_memory_()  # which moves it, and frees where it was
    layer.get_buffer("scale").zero_()
    layer.get_buffer("offset").zero_()
    assert not layer(x).any()
    for twin in twins:
        assert twin(x).equal(expected)


def test_inputs_with_gradients_are_multiplied_where_none_are_asked_for() -> None:
    layer = stored_layer(100, Grouping(columns=64, size=32), 2)
    layer.use("lanes", torch.float32)
    expected = layer(x := noise(1, 3, 64))
    x.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert layer(x).equal(expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
def test_a_fork_computes_and_saves_the_same() -> None:
    layer = stored_layer(200, Grouping(columns=192, size=64), 5)
    layer.use("lanes", torch.float32)
    expected, before = layer(x := noise(1, 3, 192)), layer.state_dict()
    outputs = torch.zeros_like(expected).share_memory_()

    def child() -> None:
        torch.set_num_threads(1)  # torch has lost its threads, too
        outputs.copy_(layer(x))
        assert all(layer.state_dict()[name].equal(tensor) for name, tensor in before.items())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)


def test_where_programs_cannot_be_compiled_layers_are_unpacked_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no threading layer")

    layer = stored_layer(64, Grouping(columns=64, size=32), 2)
    expected = layer(x := noise(1, 3, 64))
    monkeypatch.setattr("dashq.runtime.lanes_programs.product", fail)
    with caplog.at_level(logging.WARNING):
        check_left_aside(layer)
    assert layer(x).equal(expected)
    assert [record.message for record in caplog.records] == [
        "the kernel lanes is left aside for 2 bits: no threading layer"
    ]


def test_programs_are_not_run_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    check_left_aside(stored_layer(64, Grouping(columns=64, size=32), 2))


def check_left_aside(layer: DashqLinear) -> None:
    """A layer does not use the kernel when it is asked to anew."""
    lanes._compiles.cache_clear()
    try:
        layer.use("lanes", torch.float32)
        layer.use("lanes", torch.float32)
    finally:
        lanes._compiles.cache_clear()
    assert layer.kernel is None
