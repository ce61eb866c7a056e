"""Settings in the header of a GGUF file that transformers leaves out of the configuration and tokenizer it builds."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from dashq.model.gguf_layout import TABLES
from dashq.model.tokenizing import added_tokens
from dashq.model.transformers_internals import (
    read_gguf_settings,
    read_gguf_table,
    read_gguf_vectors,
    rotary_frequencies,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # transformers' words and those of GGUF
TEMPLATE = "tokenizer.chat_template"
ATTENTION = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Sizes and the like that transformers does not read of every architecture that has them.
SIZES = {
    "context_length": "max_position_embeddings",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attention.layer_norm_epsilon": "layer_norm_eps",
}
TIED = {"falcon", "bloom"}  # of whose heads transformers does not ask
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # where a file names them
# Endings of tensors that say which biases there are, in whichever layers attend or have a network.
BIASES = {"attention_bias": ".attn_q.bias", "mlp_bias": ".ffn_up.bias"}
# Low and high frequency factors, and the context, of Llama 3.1 and all after it; what a file holds follows from them.
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Vocabularies of characters, and those of bytes that are cut in these ways, begin texts where no key says otherwise.
BEGINNING = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}


def complete_config(config: "PretrainedConfig", path: Path) -> None:
    """Give a configuration the attention, and the tokens that end a turn, of the GGUF file at `path`.

    Raises a `ValueError` for rotary embeddings that are not known to be read right.
    """
    settings = read_gguf_settings(str(path))
    own = {key.partition(".")[2]: value for key, value in settings.items()}  # of the architecture's keys and others
    for key, name in SIZES.items():
        if key in own and hasattr(config, name):
            setattr(config, name, own[key])
    names = {name for name, *_ in read_gguf_table(str(path))[1]}
    for name, end in BIASES.items():
        if hasattr(config, name):
            setattr(config, name, any(tensor.endswith(end) for tensor in names))
    if config.model_type in TIED:
        config.tie_word_embeddings = "output.weight" not in names
    if config.model_type == "gpt2":
        config.n_inner = own.get("feed_forward_length")  # four times the width where it says nothing
    if config.model_type == "falcon":
        _complete_falcon(config, own, two_norms="blk.0.attn_norm_2.weight" in names)
    size = _head_size(config)
    if size is not None:  # others have no heads, or heads of several sizes, and stay as transformers reads them
        _complete_attention(config, own, size)
        if getattr(config, "rope_parameters", None):
            _complete_rope(config, own, read_gguf_vectors(str(path), TABLES))
    turn = settings.get("tokenizer.ggml.eot_token_id")
    if turn is not None and config.eos_token_id is not None and turn != config.eos_token_id:
        config.eos_token_id = [config.eos_token_id, turn]


def _complete_falcon(config: Any, own: Mapping[str, Any], two_norms: bool) -> None:
    """The first Falcon shares one head of keys among all, later ones share several; these may have two norms."""
    heads, keys = config.num_attention_heads, own["attention.head_count_kv"]
    config.ffn_hidden_size = own["feed_forward_length"]
    config.num_kv_heads, config.multi_query = keys, keys == 1
    config.new_decoder_architecture = two_norms or 1 < keys < heads
    config.num_ln_in_parallel_attn = (2 if two_norms else 1) if config.new_decoder_architecture else None


def _complete_attention(config: Any, own: Mapping[str, Any], size: int) -> None:
    width = own.get("attention.key_length", size)
    if width != size:
        config.head_dim = width
    for key, name in ATTENTION.items():
        if key in own and hasattr(config, name):
            setattr(config, name, own[key] or None)  # a window of 0 is none
    if isinstance(pattern := own.get("attention.sliding_window_pattern"), list) and hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    if hasattr(config, "query_pre_attn_scalar"):
        # llama.cpp knows the largest models, whose scalar is another one, by their number of blocks.
        largest = (config.model_type, config.num_hidden_layers) in (("gemma2", 46), ("gemma3_text", 62))
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else width


def _complete_rope(config: Any, own: Mapping[str, Any], tables: Mapping[str, Float[Tensor, " frequencies"]]) -> None:
    parameters = config.rope_parameters
    main = parameters.get("full_attention", parameters)
    kind = own.get("rope.scaling.type", "none")
    if "rope.freq_base" in own:
        main["rope_theta"] = own["rope.freq_base"]
    if kind == "linear":
        main.update(rope_type="linear", factor=own["rope.scaling.factor"])
    elif kind == "yarn" and main.get("rope_type") != "yarn":
        _complete_yarn(main, own)
    elif "rope_factors_long.weight" in tables:
        _complete_longrope(config, own, tables)
    elif kind not in ("none", main.get("rope_type")):
        raise ValueError(f"it scales rotary embeddings by {kind!r}, which cannot be read from GGUF files")
    if "rope.freq_base_swa" in own and "sliding_attention" in parameters:
        parameters["sliding_attention"]["rope_theta"] = own["rope.freq_base_swa"]
    size = own.get("attention.key_length", _head_size(config))
    if "partial_rotary_factor" in main and "rope.dimension_count" in own:
        main["partial_rotary_factor"] = own["rope.dimension_count"] / size
    turned = int(size * main.get("partial_rotary_factor", 1.0))
    if (own_turned := own.get("rope.dimension_count", turned)) != turned:
        raise ValueError(f"it turns {own_turned} of {size} dimensions, which cannot be read from GGUF files")
    if "rope_freqs.weight" in tables:
        _complete_llama3(config, tables["rope_freqs.weight"])


def _complete_yarn(rope: dict[str, Any], own: Mapping[str, Any]) -> None:
    """YaRN as llama.cpp computes it where the file says no more than how far."""
    for key, value in own.items():
        name = key.removeprefix("rope.scaling.yarn_")
        if name != key and YARN.get(name) != value:
            raise ValueError(f"it computes YaRN with {name} = {value}, which cannot be read from GGUF files")
    original = own["rope.scaling.original_context_length"]
    rope.update(rope_type="yarn", factor=own["rope.scaling.factor"], original_max_position_embeddings=original)


def _complete_longrope(
    config: Any, own: Mapping[str, Any], tables: Mapping[str, Float[Tensor, " frequencies"]]
) -> None:
    """Rotary frequencies that are slowed down by one factor each for long texts, and by another for short ones."""
    original = own["rope.scaling.original_context_length"]
    config.original_max_position_embeddings = original
    config.rope_parameters |= {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": own.get("rope.scaling.attn_factor", 1.0),
        "long_factor": tables["rope_factors_long.weight"].tolist(),
        "short_factor": tables["rope_factors_short.weight"].tolist(),
    }


def _complete_llama3(config: Any, slowed: Float[Tensor, " frequencies"]) -> None:
    """Rotary frequencies as Llama 3.1 has them: the file holds the factors, from which those of the rule are found."""
    config.rope_parameters |= {"rope_type": "llama3", "factor": float(slowed.max()), **LLAMA_3}
    expected, _ = rotary_frequencies("llama3", config)
    size = 2 * len(slowed)
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    if len(expected) != len(slowed) or not torch.allclose(plain / slowed, expected, rtol=1e-4):
        raise ValueError("it slows rotary embeddings down otherwise than Llama 3.1 does: use the model's safetensors")


def _head_size(config: Any) -> int | None:
    """The columns of each head; None where there are no heads, or where their sizes differ."""
    if hasattr(config, "global_head_dim") or hasattr(config, "kv_lora_rank"):
        return None
    try:
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    except (AttributeError, RuntimeError):
        return None


def complete_tokenizer(tokenizer: "PreTrainedTokenizerBase", path: Path) -> None:
    """Give a tokenizer the special tokens, the tokens around texts and the chat template of the GGUF file at `path`.

    Raises a `ValueError` where it cannot have them.
    """
    settings = read_gguf_settings(str(path))
    for word, name in TOKENS.items():
        number = settings.get(f"tokenizer.ggml.{name}_token_id")
        token = None if number is None else tokenizer.convert_ids_to_tokens(number)
        if token is not None:
            tokenizer.add_special_tokens({f"{word}_token": token})
        if number is not None and getattr(tokenizer, f"{word}_token_id") != number:
            raise ValueError(f"its {word}_token is number {number}, which what transformers builds of it cannot have")
    _complete_ends(tokenizer, settings)
    templates = {
        key.removeprefix(TEMPLATE).removeprefix(".") or "default": text
        for key, text in settings.items()
        if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")
    }
    if not all(isinstance(text, str) for text in templates.values()):
        raise ValueError("its chat template is no text")
    if templates:
        tokenizer.chat_template = templates["default"] if [*templates] == ["default"] else templates


def _complete_ends(tokenizer: "PreTrainedTokenizerBase", settings: Mapping[str, Any]) -> None:
    """Have a tokenizer put before and behind texts what llama.cpp does."""
    begins = settings.get("tokenizer.ggml.model") == "llama" or settings.get("tokenizer.ggml.pre") in BEGINNING
    bos = settings.get("tokenizer.ggml.add_bos_token", begins and tokenizer.bos_token_id is not None)
    eos = settings.get("tokenizer.ggml.add_eos_token", False)
    expected = ([tokenizer.bos_token_id] if bos else [], [tokenizer.eos_token_id] if eos else [])
    if added_tokens(tokenizer) != expected:
        backend: Any = tokenizer
        backend.add_bos_token, backend.add_eos_token = bos, eos
    if added_tokens(tokenizer) != expected:
        raise ValueError(f"it puts the tokens {expected} around texts, and what transformers builds of it does not")
