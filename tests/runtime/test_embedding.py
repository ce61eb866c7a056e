"""Opened models look tokens up in packed embeddings row by row, and tied heads compute with the same tensors."""

import copy
import gc
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from dashq import (
    CheckpointError,
    Grouping,
    Layer,
    Quantized,
    Serializer,
    StoredLayer,
    kernels_in_use,
    run,
    use_kernels,
)
from dashq.results.checkpoint import open_checkpoint
from dashq.results.report import read_report
from dashq.results.verify import verify
from dashq.runtime.embedding import DashqEmbedding, DashqTiedHead
from dashq.runtime.linear import DashqLinear
from dashq.solving.arithmetic import round_to_nearest
from dashq_plugins.formats.native import NativeSerializer
from pico import WIDE, pico_model, pico_tokenizer
from recipes import build_recipe, small_scheme
from tensors import noise

IDS = torch.arange(12)[None]
# Tied and untied, a scale inside the embeddings' own module, a norm behind them, a transposed rest.
FAMILIES = ("llama", "llama-untied-biased", "gemma3", "bloom", "gpt2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embeddings")


@cache
def packed(family: str, folder: Path) -> Path:
    """A result with quantized embeddings, and with a quantized head where it is a matrix of its own."""
    head: dict[str, Any] = {"head": {"bits": 5}} if family == "llama-untied-biased" else {}
    scheme = small_scheme(solver="rtn")
    path = pico_model(family, folder / f"{family}-model")
    return run(build_recipe(path, folder / family, scheme=scheme, embeddings={"bits": 4}, **head))


def opened(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def unpacked(family: str, folder: Path) -> Any:
    """The original with the weights that the result's numbers stand for."""
    network = opened(folder / f"{family}-model")
    checkpoint = open_checkpoint(packed(family, folder))
    for name in checkpoint.layers:
        weight, module = checkpoint.quantized(name).dequantize(), network.get_submodule(name)
        module.weight.data.copy_(weight if isinstance(module, nn.Linear | nn.Embedding) else weight.T)
    return network


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantized_weights(family: str, folder: Path, tmp_path: Path) -> None:
    network, expected = opened(packed(family, folder)), unpacked(family, folder)(IDS).logits
    assert isinstance(network.get_input_embeddings(), DashqEmbedding)
    torch.testing.assert_close(network(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert network.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 15)
    network.save_pretrained(tmp_path)
    pico_tokenizer().save_pretrained(tmp_path)
    assert (
        load_file(tmp_path / "model.safetensors").keys()
        == load_file(packed(family, folder) / "model.safetensors").keys()
    )
    again = opened(tmp_path)
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    plain = again.dequantize()
    assert not any(isinstance(module, DashqEmbedding | DashqLinear) for module in plain.modules())
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    tied = family != "llama-untied-biased"
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied


@torch.no_grad()
def test_only_the_rows_of_the_given_tokens_are_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = opened(packed("llama", folder))
    rows: list[int] = []
    unpack = NativeSerializer.unpack

    def count(self: Serializer, tensors: dict[str, Tensor], *rest: Any) -> Quantized:
        rows.append(len(tensors["codes"]))
        return unpack(self, tensors, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(NativeSerializer, "unpack", count)
    states = network.get_input_embeddings()(torch.tensor([[5, 5, 9]]))
    assert rows == [3]
    assert states.shape == (1, 3, 48)
    assert states[0, 0].equal(states[0, 1])


@torch.no_grad()
def test_they_compute_in_the_type_that_the_model_is_cast_to(folder: Path) -> None:
    network = opened(packed("gemma3", folder), torch.bfloat16)
    assert network.get_input_embeddings()(IDS).dtype == torch.bfloat16
    assert network.to(torch.float32).get_input_embeddings()(IDS).dtype == torch.float32
    torch.testing.assert_close(network(IDS).logits, unpacked("gemma3", folder)(IDS).logits, rtol=0.1, atol=0.1)


@torch.no_grad()
def test_a_tied_head_holds_nothing_of_its_own(folder: Path) -> None:
    network = opened(packed("llama", folder))
    head = network.get_output_embeddings()
    assert isinstance(head, DashqTiedHead)
    assert not list(head.parameters())
    assert not list(head.buffers())
    assert not [name for name in network.state_dict() if name.startswith("lm_head")]
    assert head.weight.equal(network.get_input_embeddings().weight)
    before = network(IDS).logits
    use_kernels(network, "exact")
    assert network.to(torch.float64)(IDS).logits.dtype == torch.float64
    torch.testing.assert_close(network.to(torch.float32)(IDS).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llama-untied-biased"])
def test_a_model_without_its_head_opens(family: str, folder: Path) -> None:
    base = AutoModel.from_pretrained(packed(family, folder), dtype=torch.float32)
    expected = opened(packed(family, folder)).base_model(IDS).last_hidden_state
    torch.testing.assert_close(base(IDS).last_hidden_state, expected)


@pytest.mark.parametrize("family", ["llama", "llama-untied-biased"])
def test_results_are_verified_and_tell_their_whole_size(family: str, folder: Path) -> None:
    path = packed(family, folder)
    assert all(check.passed for check in verify(path))
    report = read_report(path)
    roles = {layer.name: layer.role for layer in report.layers if layer.role != "linear"}
    tied = {"model.embed_tokens": "tied"}
    assert roles == (tied if family == "llama" else {"model.embed_tokens": "embeddings", "lm_head": "head"})
    size = (path / "model.safetensors").stat().st_size
    parameters = sum(parameter.numel() for parameter in opened(folder / f"{family}-model").parameters())
    assert report.totals.parameters == parameters
    assert report.totals.bits_per_parameter == pytest.approx(8 * size / parameters)
    assert f"{report.totals.bits_per_parameter:.3f} bits per parameter" in (path / "README.md").read_text()


def test_files_without_them_are_refused(folder: Path, tmp_path: Path) -> None:
    network = opened(packed("llama", folder))
    network.config.quantization_config.layers["model.embed_tokens"]["bits"] = 5
    network.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not fit model\.embed_tokens\.codes: by its bits and group size"):
        opened(tmp_path)


def tied_network(bits: int, grouping: Grouping, dtype: torch.dtype) -> Any:
    """Packed embeddings of 96 tokens and the head that is the same matrix."""
    serializer = NativeSerializer()
    grid, ordered = serializer.grid(bits), grouping.order is not None
    quantized = round_to_nearest(grouping.split(noise(0, 96, grouping.columns)), grid, grouping)
    layer = Layer(name="table", rows=96, columns=grouping.columns)
    stored = StoredLayer(layer=layer, grid=grid, size=grouping.size, ordered=ordered)
    embedding = DashqEmbedding(nn.Embedding(96, grouping.columns, dtype=dtype), serializer, stored)
    embedding.load_state_dict(serializer.pack(quantized))
    return nn.ModuleDict({"embeddings": embedding, "head": DashqTiedHead(embedding, bias=False)})


@torch.no_grad()
@pytest.mark.parametrize("name", ["int4", "lanes"])
def test_a_kernel_of_a_tied_head_leaves_the_embeddings_as_they_are(name: str) -> None:
    network = tied_network(4, Grouping(columns=64, size=32), torch.bfloat16)
    saved = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    x, weight = noise(1, 3, 64).bfloat16(), network["head"].weight
    exact = network["head"](x)
    use_kernels(network, name, torch.bfloat16)
    if name not in kernels_in_use(network):
        pytest.skip(f"{name} does not work here")
    torch.testing.assert_close(network["head"](x), exact, rtol=0.05, atol=0.05)
    assert network["head"].weight.equal(weight)
    assert network["embeddings"].weight.equal(weight)
    assert network["embeddings"](torch.tensor([7, 7]))[1].equal(weight.bfloat16()[7])
    assert network.state_dict().keys() == saved.keys()
    network.to(torch.float32)
    assert network["embeddings"](torch.tensor([7])).dtype == torch.float32
    assert all(tensor.equal(saved[name]) for name, tensor in network.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize(
    "grouping", [Grouping(columns=64, size=32), Grouping(columns=100, size=24, order=torch.randperm(100))]
)
def test_a_kernel_that_finds_single_rows_holds_the_matrix_for_head_and_embeddings(
    bits: int, grouping: Grouping
) -> None:
    pytest.importorskip("numba")
    network, index = tied_network(bits, grouping, torch.float32), torch.tensor([[95, 0, 64], [0, 63, 1]])
    weight = network["embeddings"].weight
    use_kernels(network, "lanes")
    assert kernels_in_use(network) == {"lanes": 1}
    assert not list(network["embeddings"].buffers())
    held = {name: tensor.data_ptr() for name, tensor in network["head"].named_buffers()}
    network.to(torch.float32)  # which changes nothing
    assert {name: tensor.data_ptr() for name, tensor in network["head"].named_buffers()} == held
    assert network["embeddings"](index).equal(weight[index])
    assert network["embeddings"].device == torch.device("cpu")
    for token in (96, 127):  # the kernel's tensors have rows for them
        with pytest.raises(IndexError):
            network["embeddings"](torch.tensor([token]))
    assert network["embeddings"](torch.tensor([-1]))[0].equal(weight[-1])
    network["embeddings"].to(torch.float64)
    assert network["embeddings"](index).equal(weight[index].double())
    assert kernels_in_use(network) == {"lanes": 1}
    network.to(torch.float32)
    network._apply(torch.clone)
    network["head"].scale.zero_()
    network["head"].offset.zero_()
    assert not network["embeddings"](index).any()
    use_kernels(network, "exact")
    assert not list(network["head"].buffers())
    assert not network["embeddings"](index).any()


@torch.no_grad()
def test_embeddings_that_a_kernel_holds_are_freed_with_the_model() -> None:
    pytest.importorskip("numba")
    network = tied_network(2, Grouping(columns=64, size=32), torch.float32)
    use_kernels(network, "lanes")
    codes = weakref.ref(network["head"].codes)
    gc.disable()
    try:
        del network
        assert codes() is None
    finally:
        gc.enable()


@torch.no_grad()
@pytest.mark.parametrize("name", ["exact", "lanes"])
def test_no_token_at_all_has_no_embedding(name: str) -> None:
    pytest.importorskip("numba")
    network = tied_network(2, Grouping(columns=64, size=32), torch.float32)
    use_kernels(network, name)
    assert network["embeddings"](torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 64)


@torch.no_grad()
def test_a_whole_model_whose_tied_matrix_a_kernel_holds(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    source = pico_model("llama", tmp_path / "model", vocab_size=330, **WIDE)
    run(build_recipe(source, tmp_path / "out", scheme=small_scheme(size=32, solver="rtn"), embeddings={"bits": 4}))
    network, exact = opened(tmp_path / "out"), opened(tmp_path / "out")
    use_kernels(exact, "exact")
    head, embeddings = network.get_output_embeddings(), network.get_input_embeddings()
    assert head.kernel
    assert not list(embeddings.buffers())
    torch.testing.assert_close(network(IDS).logits, exact(IDS).logits, rtol=1e-4, atol=1e-4)
    options: Any = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    batch, mask = IDS.repeat(2, 1), torch.ones(2, IDS.shape[1], dtype=torch.long)
    mask[1, :3] = 0
    outputs = [each.generate(batch, attention_mask=mask, **options) for each in (network, exact)]
    assert outputs[0].equal(outputs[1])
    network.save_pretrained(tmp_path / "again")
    names = [load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "again")]
    assert names[0].keys() == names[1].keys()
    assert all(names[1][key].equal(tensor) for key, tensor in names[0].items())


@torch.no_grad()
def test_weights_are_loaded_into_embeddings_that_a_kernel_holds() -> None:
    pytest.importorskip("numba")
    grouping = Grouping(columns=64, size=32)
    network, other = (tied_network(bits, grouping, torch.float32) for bits in (3, 3))
    other["embeddings"].scale.mul_(2)
    use_kernels(network, "lanes")
    network.load_state_dict(other.state_dict())
    assert network["embeddings"].weight.equal(other["embeddings"].weight)
    assert network["head"].weight.equal(other["embeddings"].weight)
    use_kernels(network, "lanes")
    twin = copy.deepcopy(network)
    network.load_state_dict(tied_network(3, grouping, torch.float32).state_dict())
    assert twin["embeddings"](torch.tensor([5]))[0].equal(other["embeddings"].weight[5])
