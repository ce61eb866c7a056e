"""A GGUF file that llama.cpp runs: names, metadata and tokenizer from a folder of transformers."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from dashq import CheckpointError

# The architecture in the file's words, by the model type of transformers.
ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3",
}
NUMPY = {torch.float32: "<f4", torch.float16: "<f2"}


class Names:
    """Tensor names of one architecture, and the rows that llama.cpp wants in another order."""

    def __init__(self, config: PretrainedConfig) -> None:
        if config.model_type not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(f"cannot write GGUF files of model type {config.model_type!r}. Known: {known}")
        self.config, self.architecture = config, ARCHITECTURES[config.model_type]
        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._map = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def in_file(self, name: str) -> str:
        """The file's name of a tensor."""
        known = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise CheckpointError(f"GGUF's {self.architecture} has no place for the tensor {name}")
        return str(known)

    def rows(self, name: str, count: int) -> Tensor | None:
        """Where llama.cpp interleaves the two halves that rotary embeddings turn: the order of a tensor's rows."""
        part = name.split(".")[-2]
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}.get(part)
        if self.architecture != "llama" or heads is None:
            return None
        return torch.arange(count).view(heads, 2, -1).transpose(1, 2).flatten()


def read_config(folder: Path) -> PretrainedConfig:
    """The model's configuration."""
    config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    return config


def plain_tensors(names: Names, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What the file holds of an unquantized tensor: vectors in float32, matrices in their own type."""
    order = names.rows(name, len(tensor))
    tensor = tensor if order is None else tensor[order]
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        prefix = f"blk.{name.split('.layers.')[1].split('.')[0]}"
        yield f"{prefix}.ffn_gate_exps.weight", gate
        yield f"{prefix}.ffn_up_exps.weight", up
        return
    if name.endswith("experts.down_proj"):
        yield f"blk.{name.split('.layers.')[1].split('.')[0]}.ffn_down_exps.weight", tensor
        return
    if names.architecture == "gemma3" and name.endswith("norm.weight"):
        tensor = tensor.float() + 1  # the file holds the factor itself
    file_name = names.in_file(name)
    yield file_name, tensor.float() if tensor.dim() == 1 or "ffn_gate_inp" in file_name else tensor


def add_metadata(writer: gguf.GGUFWriter, config: PretrainedConfig, file_type: int) -> None:
    """What llama.cpp has to know of the model's shape."""
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(str(getattr(config, "name_or_path", "") or config.model_type))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if experts := getattr(config, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if window := getattr(config, "sliding_window", None):
        writer.add_sliding_window(window)
    _add_rope_scaling(writer, rope, size)


def _add_rope_scaling(writer: gguf.GGUFWriter, rope: Mapping[str, Any], size: int) -> None:
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, size))
    elif kind != "default":
        raise CheckpointError(f"cannot write rotary embeddings of type {kind!r} to a GGUF file")


def _llama3_factors(rope: Mapping[str, Any], size: int) -> numpy.ndarray[Any, numpy.dtype[numpy.float32]]:
    """By how much each rotary frequency is slowed down: not, fully, or in between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    factors = []
    for index in range(0, size, 2):
        turns = context / (2 * math.pi * rope["rope_theta"] ** (index / size))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return numpy.array(factors, dtype=numpy.float32)


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocabulary: int, pre_tokenizer: str | None) -> None:
    """The tokenizer of `tokenizer.json`, a byte-pair encoding of bytes or of characters with bytes to fall back on."""
    path = folder / "tokenizer.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model = content["model"]
        tokens = model["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: a GGUF file needs a tokenizer in this form: {error!r}") from error
    if model["type"] != "BPE":
        raise CheckpointError(f"{path}: cannot write a tokenizer of type {model['type']} to a GGUF file")
    special = {token["id"]: token["special"] for token in content["added_tokens"]}
    texts = {number: text for text, number in tokens.items()}
    by_character = bool(model.get("byte_fallback"))
    names, types = [], []
    for number in range(vocabulary):
        names.append(texts.get(number, f"[PAD{number}]"))
        types.append(_type(names[-1], special.get(number), number in texts, by_character))
    writer.add_tokenizer_model("llama" if by_character else "gpt2")
    writer.add_tokenizer_pre("default" if by_character else pre_tokenizer or _pre_tokenizer(path, content))
    writer.add_token_list(names)
    writer.add_token_types(types)
    if by_character:  # llama.cpp merges what has the best score first
        ranks = {"".join(pair): -float(rank) for rank, pair in enumerate(map(_pair, model["merges"]))}
        writer.add_token_scores([ranks.get(name, -1e9) for name in names])
    gguf.SpecialVocab(folder, load_merges=not by_character, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _type(text: str, special: bool | None, used: bool, by_character: bool) -> gguf.TokenType:
    if not used:
        return gguf.TokenType.UNUSED
    if special is not None:
        return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    if by_character and len(text) == 6 and text.startswith("<0x"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _pre_tokenizer(path: Path, content: Mapping[str, Any]) -> str:
    """How text is cut before it is merged, in llama.cpp's words."""
    pre = content.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    pattern = next((step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"), "")
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    if "\\p{N}{1,3}" in pattern and "(?i:" in pattern:
        return "llama-bpe"
    if "|\\p{N}|" in pattern and "(?i:" in pattern:
        return "qwen2"
    raise CheckpointError(f"{path}: llama.cpp's name for its pre-tokenizer is not known; give it as `pre_tokenizer`")
