"""Models in GGUF files are read as transformers holds them, whatever llama.cpp has turned, shifted or quantized."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dashq import CheckpointError, run
from dashq.measuring.evaluate import load_model
from dashq.quantizing.opening import open_model
from pico import FAMILIES, SMALL, pico_tokenizer
from recipes import build_recipe, small_scheme
from tensors import tensors_of

# Sizes that the blocks of Q8_0, 32 weights each, divide.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma3": {"sliding_window_pattern": 6},
}


def pico_network(family: str) -> PreTrainedModel:
    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**(SMALL | changes | SIZES | ARCHITECTURES[family]))
    torch.manual_seed(0)
    network: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.data.mean()), std=0.1)
    return network.requires_grad_(False)


def as_llama_cpp_holds_it(tensor: Tensor, name: str, architecture: str, network: PreTrainedModel) -> Tensor:
    """What convert_hf_to_gguf.py does to some tensors, in its own terms."""
    config = network.config
    if architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        turned = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return turned.swapaxes(1, 2).reshape(tensor.shape)
    return tensor + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else tensor


def kind_of(name: str) -> Kind:
    if "norm" in name or name.endswith(".bias"):
        return Kind.F32
    return Kind.Q8_0 if "ffn" in name or "attn_q" in name else Kind.F16


def write_gguf(path: Path, family: str, network: PreTrainedModel, kind: Callable[[str], Kind] = kind_of) -> None:
    """A file as llama.cpp would make it of the network: metadata, vocabulary and tensors."""
    config = network.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("rope_theta", 1e6))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    write_vocabulary(writer, config.vocab_size)
    names = names_in_file(family, network)
    for key, tensor in network.state_dict().items():
        if key in network.all_tied_weights_keys:
            continue
        values = as_llama_cpp_holds_it(tensor, names[key], family, network).numpy()
        wanted = kind(names[key])
        writer.add_tensor(names[key], gguf.quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    tokenizer = pico_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokens, *(f"<unused{index}>" for index in range(len(tokens), size))])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)


def names_in_file(family: str, network: PreTrainedModel) -> dict[str, str]:
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(kind, network.config.num_hidden_layers)
    file_names = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in network.state_dict()}
    return {key: name for key, name in file_names.items() if name}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_tensor_is_read_as_transformers_holds_it(family: str, tmp_path: Path) -> None:
    network = pico_network(family)
    write_gguf(tmp_path / "pico.gguf", family, network)
    tensors = tensors_of(open_model(build_recipe(tmp_path / "pico.gguf", tmp_path / "out")))
    expected = {key: tensor for key, tensor in network.state_dict().items() if key not in network.all_tied_weights_keys}
    assert tensors.keys() == expected.keys()
    for key, name in names_in_file(family, network).items():
        if key not in expected:
            continue
        difference = (tensors[key].float() - expected[key]).abs()
        if kind_of(name) is Kind.Q8_0:  # half a step of a block of 32 whose largest weight is 127 steps, and float16
            largest = expected[key].abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
            assert bool((difference <= largest * (0.5 / 127 + 2e-3)).all()), key
        elif kind_of(name) is Kind.F16:
            assert torch.equal(tensors[key].half(), expected[key].half()), key
        else:  # Gemma's norms lose a digit on the way
            assert float(difference.max()) < 1e-6, key


def test_a_gguf_file_is_quantized_like_any_model_with_its_tokenizer(tmp_path: Path) -> None:
    network = pico_network("llama")
    write_gguf(tmp_path / "pico.gguf", "llama", network)
    scheme = small_scheme(bits=8)
    out = run(build_recipe(tmp_path / "pico.gguf", tmp_path / "out", scheme=scheme, dtype="float32"))
    result = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits, expected = result(ids).logits, network(ids).logits
    assert float((logits - expected).square().mean()) < 5e-3 * float(expected.square().mean())
    text = "while x: assert y"
    assert AutoTokenizer.from_pretrained(out).encode(text) == pico_tokenizer().encode(text)


def test_a_tensor_that_the_model_has_no_place_for_is_named(tmp_path: Path) -> None:
    name, changes = FAMILIES["llama"]
    config = getattr(transformers, name)(**(SMALL | changes | SIZES | {"attention_bias": True}))
    network = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for layer in network.model.layers:
        layer.self_attn.q_proj.bias = None  # which tells whether there are biases
    write_gguf(tmp_path / "pico.gguf", "llama", network)
    with pytest.raises(CheckpointError, match=r"pico\.gguf.* has no place for 9 .*blk\.0\.attn_k\.bias"):
        open_model(build_recipe(tmp_path / "pico.gguf", tmp_path / "out"))


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "pico.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"pico\.gguf: cannot read GGUF files of architecture 'rwkv7'. Known: ll"):
        open_model(build_recipe(tmp_path / "pico.gguf", tmp_path / "out"))


@pytest.mark.parametrize("keep", [0, 3, 20, 300, 6000, -1])
def test_a_truncated_file_is_named(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "pico.gguf"
    write_gguf(path, "llama", pico_network("llama"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pico\.gguf is truncated"):
        run(build_recipe(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "pico.gguf").write_text("<html>404: not found</html>")
    with pytest.raises(CheckpointError, match=r"pico\.gguf is truncated or not a GGUF file: .*magic bytes"):
        run(build_recipe(tmp_path / "pico.gguf", tmp_path / "out"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "MXFP4"])
def test_every_type_that_the_gguf_package_dequantizes_is_read_as_it_does(kind: str, tmp_path: Path) -> None:
    network = pico_network("qwen2")
    names = names_in_file("qwen2", network)
    write_gguf(tmp_path / "pico.gguf", "qwen2", network, lambda name: Kind[kind] if "ffn" in name else kind_of(name))
    tensors = tensors_of(open_model(build_recipe(tmp_path / "pico.gguf", tmp_path / "out")))
    layers = [key for key, name in names.items() if "ffn" in name and "norm" not in name]
    assert len(layers) == 9
    for key in layers:
        expected = gguf.dequantize(gguf.quantize(network.state_dict()[key].numpy(), Kind[kind]), Kind[kind])
        assert torch.equal(tensors[key], torch.from_numpy(expected).to(tensors[key].dtype)), key


def write_changed(path: Path, change: Callable[[gguf.GGUFWriter], None]) -> Path:
    """A file of a pico model in which `change` has the last word on metadata and tensors."""
    network = pico_network("llama")

    class Writer(gguf.GGUFWriter):
        def write_header_to_file(self, path: Path | None = None) -> None:
            change(self)
            super().write_header_to_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        write_gguf(path, "llama", network)
    return path


def metadata(**entries: int | None) -> Callable[[gguf.GGUFWriter], None]:
    """Set entries of the metadata to other values; None takes one out."""

    def change(writer: gguf.GGUFWriter) -> None:
        data = writer.kv_data[0]
        for name, value in entries.items():
            key = next(key for key in data if key.endswith(f".{name}"))
            data.pop(key)
            if value is not None:
                data[key] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.UINT32)

    return change


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"block_count": 100_000}, "says 100000 decoder blocks, where the files hold 29 tensors in all"),
        ({"head_count": 0}, "ZeroDivisionError"),
        ({"embedding_length": 2**31}, "is no causal language model that transformers can build"),
        ({"feed_forward_length": 160}, "gate_proj.weight has shape [96, 64] where the model's configuration"),
        ({"tokens": None}, "embed_tokens.weight has shape [320, 64] where the model's configuration needs [32000, 64]"),
        ({"merges": None}, "holds no readable tokenizer"),
        ({"eos_token_id": 10**9}, "holds no readable tokenizer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_metadata_is_refused_in_one_line(entries: dict[str, int | None], words: str, tmp_path: Path) -> None:
    path = write_changed(tmp_path / "pico.gguf", metadata(**entries))
    for start in (lambda: run(build_recipe(path, tmp_path / "out")), lambda: load_model(str(path))):
        with pytest.raises(CheckpointError) as error:
            start()
        assert str(error.value).startswith(str(path))
        assert words in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def with_type(number: int) -> Callable[[gguf.GGUFWriter], None]:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.tensors[0]["blk.1.attn_v.weight"].dtype = number  # type: ignore[assignment]

    return change


@pytest.mark.parametrize(("number", "words"), [(Kind.I32, "I32"), (9999, "number 9999")])
def test_a_type_that_cannot_be_dequantized_is_named_with_its_tensor(number: int, words: str, tmp_path: Path) -> None:
    path = write_changed(tmp_path / "pico.gguf", with_type(number))
    message = (
        rf"pico\.gguf: the tensor blk\.1\.attn_v\.weight is of type {words}, which cannot be read\. Known: F32, F16"
    )
    with pytest.raises(CheckpointError, match=message):
        open_model(build_recipe(path, tmp_path / "out"))


def test_a_tensor_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = write_changed(tmp_path / "pico.gguf", lambda writer: None)
    path.write_bytes(path.read_bytes().replace(b"blk.1.attn_v.weight", b"blk.0.attn_v.weight"))
    with pytest.raises(CheckpointError, match=r"pico\.gguf holds the tensor blk\.0\.attn_v\.weight 2 times"):
        open_model(build_recipe(path, tmp_path / "out"))
