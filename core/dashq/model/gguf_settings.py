"""Settings in the header of a GGUF file that transformers leaves out of the configuration and tokenizer it builds."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dashq.model.tokenizing import added_tokens
from dashq.model.transformers_internals import read_gguf_settings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # transformers' words and those of GGUF
TEMPLATE = "tokenizer.chat_template"
ATTENTION = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Vocabularies of characters, and those of bytes that are cut in these ways, begin texts where no key says otherwise.
BEGINNING = {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"}


def complete_config(config: "PretrainedConfig", path: Path) -> None:
    """Give a configuration the attention, and the tokens that end a turn, of the GGUF file at `path`.

    Raises a `ValueError` for rotary embeddings that are not known to be read right.
    """
    settings = read_gguf_settings(str(path))
    own = {key.partition(".")[2]: value for key, value in settings.items()}  # of the architecture's keys and others
    size = _head_size(config)
    if size is not None:  # others have no heads, or heads of several sizes, and stay as transformers reads them
        _complete_attention(config, own, size)
        if getattr(config, "rope_parameters", None):
            _complete_rope(config, own)
    turn = settings.get("tokenizer.ggml.eot_token_id")
    if turn is not None and config.eos_token_id is not None and turn != config.eos_token_id:
        config.eos_token_id = [config.eos_token_id, turn]


def _complete_attention(config: Any, own: Mapping[str, Any], size: int) -> None:
    width = own.get("attention.key_length", size)
    if width != size:
        config.head_dim = width
    for key, name in ATTENTION.items():
        if key in own and hasattr(config, name):
            setattr(config, name, own[key])
    if isinstance(pattern := own.get("attention.sliding_window_pattern"), list) and hasattr(config, "layer_types"):
        config.layer_types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    if hasattr(config, "query_pre_attn_scalar"):
        # llama.cpp knows the largest models, whose scalar is another one, by their number of blocks.
        largest = (config.model_type, config.num_hidden_layers) in (("gemma2", 46), ("gemma3_text", 62))
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else width


def _complete_rope(config: Any, own: Mapping[str, Any]) -> None:
    parameters = config.rope_parameters
    kind = own.get("rope.scaling.type", "none")
    if kind == "linear":
        parameters.get("full_attention", parameters).update(rope_type="linear", factor=own["rope.scaling.factor"])
    elif kind not in ("none", parameters.get("rope_type")):
        raise ValueError(f"it scales rotary embeddings by {kind!r}, which cannot be read from GGUF files")
    if "rope.freq_base_swa" in own and "sliding_attention" in parameters:
        parameters["sliding_attention"]["rope_theta"] = own["rope.freq_base_swa"]
    size = own.get("attention.key_length", _head_size(config))
    turned = int(size * parameters.get("partial_rotary_factor", 1.0))
    if (own_turned := own.get("rope.dimension_count", turned)) != turned:
        raise ValueError(f"it turns {own_turned} of {size} dimensions, which cannot be read from GGUF files")


def _head_size(config: Any) -> int | None:
    """The columns of each head; None where there are no heads, or where their sizes differ from layer to layer."""
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
