"""What a GGUF file says of heads, special tokens and chats holds in the models that are made of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    StableLmConfig,
)

from dashq import run
from dashq.model import gguf_settings
from dashq.model.files import read_gguf_network
from dashq.model.gguf_settings import complete_config, complete_tokenizer
from dashq.model.loading import read_config, read_tokenizer
from dashq.model.location import Location
from dashq.results.checkpoint import open_network
from gguf_results import FAMILIES as RESULTS
from gguf_results import SIZES, recipe
from pico import beginning_tokenizer, character_tokenizer, pico_model, pico_tokenizer
from recipes import build_recipe, small_scheme

TEXT = "while x: assert y</s>"
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "plain": pico_tokenizer,
    "beginning": lambda: beginning_tokenizer("<s>"),
    "characters": lambda: character_tokenizer(prefix=True),
    "without a space": lambda: character_tokenizer(prefix=False),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma3": {"query_pre_attn_scalar": 16},
}


def gguf_file(folder: Path, family: str = "llama", tokenizer: str = "plain") -> Location:
    """A GGUF file of a pico model, alone in a folder; the model is in the folder beside it."""
    model = pico_model(family, folder / "model", **SIZES, **FAMILIES[family])
    TOKENIZERS[tokenizer]().save_pretrained(model)
    out = run(recipe(model, folder / "out"))
    (folder / "file").mkdir()
    (out / "model.gguf").rename(folder / "file" / "model.gguf")
    return Location(folder / "file", "model.gguf")


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [
        ("llama", "plain"),
        ("llama", "beginning"),
        ("llama", "characters"),
        ("qwen2", "plain"),
        ("qwen2", "beginning"),
        ("qwen3", "beginning"),
        ("gemma3", "without a space"),
    ],
)
def test_a_result_begins_ends_and_chats_as_the_model_of_the_file_did(
    family: str, tokenizer: str, tmp_path: Path
) -> None:
    location = gguf_file(tmp_path, family, tokenizer)
    out = run(build_recipe(location.folder / "model.gguf", tmp_path / "result", scheme=small_scheme(bits=8)))
    expected = AutoTokenizer.from_pretrained(tmp_path / "model")
    for opened in (read_tokenizer(location), AutoTokenizer.from_pretrained(out)):
        for kind in ("bos", "eos", "pad", "unk"):
            if (token := getattr(expected, f"{kind}_token")) is not None:
                assert getattr(opened, f"{kind}_token") == token
                assert getattr(opened, f"{kind}_token_id") == getattr(expected, f"{kind}_token_id")
        assert opened.chat_template == expected.chat_template
        assert opened.encode(TEXT) == expected.encode(TEXT)


def test_the_size_of_heads_is_that_of_the_file(tmp_path: Path) -> None:
    location = gguf_file(tmp_path, "qwen3")
    out = run(build_recipe(location.folder / "model.gguf", tmp_path / "result", scheme=small_scheme(bits=8)))
    ids = torch.arange(40)[None]
    networks = [read_gguf_network(location, torch.float32), AutoModelForCausalLM.from_pretrained(out, dtype="float32")]
    with torch.no_grad():
        expected, logits = [network(ids).logits for network in networks]
    assert [network.config.head_dim for network in networks] == [32, 32]
    assert float((logits - expected).square().mean()) < 1e-2 * float(expected.square().mean())


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("falcon", ("ffn_hidden_size", "multi_query", "new_decoder_architecture", "tie_word_embeddings")),
        ("falcon-grouped", ("ffn_hidden_size", "num_kv_heads", "new_decoder_architecture", "tie_word_embeddings")),
        ("gpt2", ("n_inner", "n_positions", "n_head")),
        ("bloom", ("n_head", "hidden_size", "tie_word_embeddings")),
        ("minimax_m2", ("head_dim", "num_local_experts", "num_experts_per_tok", "rope_parameters")),
    ],
)
def test_what_transformers_leaves_out_is_completed_and_the_network_computes_as_the_result_does(
    family: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    base, own = RESULTS[family]
    changes: dict[str, Any] = SIZES | own | {"tie_word_embeddings": False}
    model = pico_model(base, tmp_path / "model", **changes)
    out = run(recipe(model, tmp_path / "out"))
    file, expected = Location(out, "model.gguf"), read_config(Location(model))
    config = read_config(file)
    for name in names:
        assert getattr(config, name) == getattr(expected, name) or name == "rope_parameters", name
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [
            network(ids).logits
            for network in (read_gguf_network(file, torch.float32), open_network(out, torch.float32))
        ]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


READ = ("head_dim", "sliding_window", "layer_types", "query_pre_attn_scalar", "final_logit_softcapping")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "qwen3-yarn", "gemma3", "gemma3-linear"])
def test_the_network_of_the_file_attends_as_the_model_does(family: str, tmp_path: Path) -> None:
    base, changes = RESULTS[family]
    sizes = {"num_hidden_layers": 3, "final_logit_softcapping": 20.0, "max_position_embeddings": 64}
    model = pico_model(base, tmp_path / "model", **SIZES | changes | sizes)
    out = run(recipe(model, tmp_path / "out"))
    config, expected = read_config(Location(out, "model.gguf")), read_config(Location(model))
    assert config.rope_parameters == expected.rope_parameters
    for name in READ if base == "gemma3" else ():
        assert getattr(config, name) == getattr(expected, name), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "it scales rotary embeddings by 'longrope'"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_log_multiplier": 0.1},
            "it computes YaRN with log_multiplier = 0.1",
        ),
        ({"llama.rope.dimension_count": 64}, "it turns 64 of 128 dimensions"),
    ],
)
def test_rotary_embeddings_that_would_be_read_wrong_are_refused(
    settings: dict[str, Any], words: str, header: dict[str, Any]
) -> None:
    header |= settings
    with pytest.raises(ValueError, match=words):
        complete_config(LlamaConfig(), Path("model.gguf"))


# Without rotary embeddings, without heads, with heads of several sizes, with a part of each head turned, and scaled.
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (GPT2Config(), {}),
        (BloomConfig(), {}),
        (MambaConfig(), {}),
        (Gemma4TextConfig(), {}),
        (StableLmConfig(), {"stablelm.rope.dimension_count": 20, "stablelm.attention.key_length": 80}),
        (GptOssConfig(), {"gpt-oss.rope.scaling.type": "yarn"}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_transformers_reads_right_stays(
    config: PretrainedConfig, settings: dict[str, Any], header: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    header |= settings
    biases = [(tensor,) for name, tensor in gguf_settings.BIASES.items() if getattr(config, name, False)]
    monkeypatch.setattr(gguf_settings, "read_gguf_table", lambda path: ("llama", biases, 0))
    before = config.to_dict()
    complete_config(config, Path("model.gguf"))
    assert config.to_dict() == before


@pytest.mark.parametrize("block", [0, 5])
def test_biases_are_found_in_whichever_layers_attend(
    block: int, header: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layers of hybrids have states."""
    monkeypatch.setattr(gguf_settings, "read_gguf_table", lambda path: ("llama", [(f"blk.{block}.attn_q.bias",)], 0))
    config = LlamaConfig(mlp_bias=True)
    complete_config(config, Path("model.gguf"))
    assert (config.attention_bias, config.mlp_bias) == (True, False)


@pytest.mark.parametrize(("blocks", "scalar"), [(34, 256), (62, 168)])
def test_queries_of_the_largest_gemma_are_divided_by_another_root(
    blocks: int, scalar: int, header: dict[str, Any]
) -> None:
    config = Gemma3TextConfig(hidden_size=5376, num_attention_heads=32, num_hidden_layers=blocks)
    complete_config(config, Path("model.gguf"))
    assert config.query_pre_attn_scalar == scalar


@pytest.fixture
def header(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings of a file that is not there."""
    settings: dict[str, Any] = {"general.architecture": "llama"}
    monkeypatch.setattr(gguf_settings, "read_gguf_settings", lambda path: settings)
    monkeypatch.setattr(gguf_settings, "read_gguf_vectors", lambda path, names: {})
    monkeypatch.setattr(gguf_settings, "read_gguf_table", lambda path: ("llama", [], 0))
    return settings


@pytest.mark.parametrize(
    ("pre", "told", "begins"),
    [
        ("llama-bpe", {}, True),
        ("llama-bpe", {"add_bos_token": False}, False),
        ("gpt-2", {}, False),
        ("gpt-2", {"add_bos_token": True}, True),
    ],
)
@pytest.mark.parametrize("built", [True, False])
def test_texts_begin_as_in_llama_cpp(
    pre: str, told: dict[str, bool], begins: bool, built: bool, header: dict[str, Any]
) -> None:
    header |= {f"tokenizer.ggml.{key}": value for key, value in ({"pre": pre, "bos_token_id": 300} | told).items()}
    tokenizer = beginning_tokenizer(*["<s>"] * built)
    complete_tokenizer(tokenizer, Path("model.gguf"))
    assert tokenizer.encode("the") == [300] * begins + [84, 260]


def test_several_chat_templates_are_kept_by_name(header: dict[str, Any]) -> None:
    header |= {"tokenizer.chat_template": "one", "tokenizer.chat_template.tool_use": "two"}
    tokenizer = pico_tokenizer()
    complete_tokenizer(tokenizer, Path("model.gguf"))
    assert tokenizer.chat_template == {"default": "one", "tool_use": "two"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokenizer.ggml.eos_token_id": 310}, "its eos_token is number 310, "),
        ({"tokenizer.ggml.add_eos_token": True}, "it puts the tokens .* around texts"),
        ({"tokenizer.chat_template": 7}, "its chat template is no text"),
    ],
)
def test_what_the_tokenizer_cannot_have_is_refused(
    settings: dict[str, Any], words: str, header: dict[str, Any]
) -> None:
    header |= settings
    tokenizer = pico_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=words):
        complete_tokenizer(tokenizer, Path("model.gguf"))


def test_the_token_that_ends_a_turn_ends_a_generation_too(header: dict[str, Any]) -> None:
    header["tokenizer.ggml.eot_token_id"] = 5
    config = LlamaConfig(eos_token_id=2)
    complete_config(config, Path("model.gguf"))
    assert config.eos_token_id == [2, 5]
