"""An opened model multiplies with kernels wherever transformers calls it, and remains the same result."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dashq import DashqLinear, Grouping, MissingPackageError, UsageError, kernels_in_use, use_kernels
from dashq.results.checkpoint import open_network
from dashq.runtime.kernel_choice import ARK_INT8X2, KERNELS, LANES
from dashq.runtime.kernel_use import exactly
from family_results import FamilyResults
from format_results import FormatResults
from kernel_layers import GRID, stored_layer
from kernel_packages import without_packages
from tensors import noise

WIDE = Grouping(columns=1024, size=64)
IDS = torch.arange(24).view(2, 12)


def opened(folder: Path, kernels: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The result as transformers opens it, with kernels that the configuration asks for."""
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["kernels"] = kernels
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, **options).requires_grad_(False)


def test_unknown_kernels_are_refused_before_weights_are_read(result: Path) -> None:
    with pytest.raises(UsageError, match=r"no kernels 'exat'. Did you mean 'exact'\?"):
        opened(result, "exat")


def test_without_the_package_all_is_as_before_and_one_line_says_what_would_be_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = nn.Sequential(stored_layer(1024, WIDE, 2), stored_layer(1024, WIDE, 2))
    expected = network(x := noise(1, 3, 1024))
    with without_packages(monkeypatch), caplog.at_level(logging.WARNING):
        use_kernels(network)
        assert kernels_in_use(network) == {"exact": 2}
        assert network(x).equal(expected)
        with pytest.raises(MissingPackageError, match="ark_int8 needs auto_round_kernel"):
            use_kernels(network, "ark_int8")
    assert [record.message for record in caplog.records] == [
        "packed layers would be faster with numba: pip install 'dashq[kernels]'"
    ]


def test_layers_that_a_named_kernel_cannot_take_are_unpacked() -> None:
    network = nn.Sequential(
        stored_layer(16, Grouping(columns=16, size=8), 4), stored_layer(16, Grouping(columns=16, size=32), 4)
    )
    use_kernels(network, "int4", torch.bfloat16)
    assert kernels_in_use(network) == {"exact": 1, "int4": 1}


def test_another_type_of_computation_has_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("auto_round_kernel")
    monkeypatch.setattr(LANES, "pays", lambda _: False)
    network = nn.Sequential(stored_layer(1024, WIDE, 2), stored_layer(64, WIDE, 2), stored_layer(16, WIDE, 2))
    use_kernels(network, dtype=torch.bfloat16)
    large = {"ark_int8x2": 1, "ark_bfloat16": 1} if ARK_INT8X2.works(GRID) else {"ark_bfloat16": 2}
    assert kernels_in_use(network) == {**large, "exact": 1}
    assert kernels_in_use(network.float()) == {"ark_float32": 2, "exact": 1}
    assert kernels_in_use(network.double()) == {"exact": 3}


def test_a_comparison_leaves_kernels_aside() -> None:
    layer = stored_layer(64, Grouping(columns=64, size=32), 4).bfloat16()
    x = noise(2, 3, 64).bfloat16()
    expected = layer(x)
    layer.use("int4", torch.bfloat16)
    with exactly(layer):
        assert layer(x).equal(expected)
    assert not layer(x).equal(expected)


@pytest.mark.parametrize("kernel", ["lanes", "ark_float32", "ark_int8x2"])
def test_no_token_and_gradients_are_as_with_unpacked_weights(kernel: str) -> None:
    pytest.importorskip(KERNELS[kernel].package or "torch")
    layer = stored_layer(64, Grouping(columns=64, size=32), 4)
    expected = layer(x := noise(2, 3, 64).requires_grad_())
    layer.use(kernel, torch.float32)
    assert layer(x[:0]).shape == (0, 64)
    assert layer(x).equal(expected)
    layer(x).sum().backward()
    assert x.grad is not None
    copied = copy.deepcopy(layer)
    assert copied(x.detach()).equal(layer(x.detach()))


LABELS = ["dashq", "mlx", "gptq", "compressed-tensors", "compressed-tensors-integer", "dashq-packed-linear"]


@pytest.mark.parametrize("label", LABELS)
def test_results_of_every_format_opened_by_dashq_use_them(label: str, results: FormatResults) -> None:
    pytest.importorskip("numba")
    exact = open_network(results[label], torch.float32, kernels="exact")
    network = open_network(results[label], torch.float32, kernels="lanes")
    assert kernels_in_use(network) == {"lanes": kernels_in_use(exact)["exact"]}
    with torch.no_grad():
        torch.testing.assert_close(network(IDS).logits, exact(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_each_expert_of_a_mixture_has_its_kernel(family: str, families: FamilyResults) -> None:
    """Experts with biases, transposed ones, and those whose tokens come dispatched."""
    pytest.importorskip("numba")
    exact, network = (opened(families.result(family), kernels) for kernels in ("exact", "lanes"))
    assert kernels_in_use(network) == {"lanes": kernels_in_use(exact)["exact"]}
    with torch.no_grad():
        torch.testing.assert_close(network(IDS).logits, exact(IDS).logits, rtol=1e-3, atol=1e-3)


def test_generation_is_the_same_in_batches_with_beams_and_with_a_static_cache(result: Path) -> None:
    pytest.importorskip("numba")
    exact, network = opened(result, "exact"), opened(result, "lanes", device_map="auto")
    assert set(kernels_in_use(network)) == {"lanes"}
    usual: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
        assert network.generate(IDS, **usual, **options).equal(exact.generate(IDS, **usual, **options))
    assert network.generate(IDS[:1], **usual).equal(exact.generate(IDS[:1], **usual))


@pytest.mark.parametrize("kernels", ["lanes", "ark_float32"])
def test_two_threads_compute_what_one_does(kernels: str, result: Path) -> None:
    pytest.importorskip(KERNELS[kernels].package or "torch")
    network, threads = opened(result, kernels), torch.get_num_threads()
    assert set(kernels_in_use(network)) == {kernels}
    outputs = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            outputs.append(network(IDS).logits)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*outputs)


def test_what_is_saved_and_dequantized_is_the_same_result(result: Path, tmp_path: Path) -> None:
    pytest.importorskip("numba")
    exact, network = opened(result, "exact"), opened(result, "lanes")
    network.save_pretrained(tmp_path)
    assert "kernels" not in (tmp_path / "config.json").read_text()
    written, saved = exact.state_dict(), opened(tmp_path, "exact").state_dict()
    assert saved.keys() == written.keys() == network.state_dict().keys()
    assert all(saved[name].dtype == tensor.dtype and saved[name].equal(tensor) for name, tensor in written.items())
    plain, expected = network.dequantize().state_dict(), exact.dequantize().state_dict()
    assert plain.keys() == expected.keys()
    assert all(plain[name].equal(tensor) for name, tensor in expected.items())
    assert not any(isinstance(module, DashqLinear) for module in network.modules())
