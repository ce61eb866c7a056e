"""Configurations, tokenizers and networks as transformers makes them of local files, with no code but trusted code."""

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dashq.errors import CheckpointError, DashqError, refusing
from dashq.model.code import refuse_foreign_code
from dashq.model.gguf_configs import build_config
from dashq.model.gguf_settings import complete_config, complete_tokenizer
from dashq.model.location import Location
from dashq.model.mappings import naming_broken
from dashq.model.tokenizing import added_tokens

TOKENIZER_FILES = [
    f"{name}.json" for name in ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab")
]
GENERATION = "generation_config.json"


class NoLanguageModelError(CheckpointError):
    """A model of a type, its `kind`, that transformers opens as no causal language model."""

    def __init__(self, location: Location, kind: str) -> None:
        super().__init__(
            f"{location} is no causal language model: transformers opens none of type {kind!r} as one. "
            "Of a model that also takes images or sounds, save the language model alone, and quantize that"
        )
        self.kind = kind


def read_config(location: Location) -> PretrainedConfig:
    """The model's configuration; a `CheckpointError` where there is none that can be read."""
    if location.trust_remote_code:
        refuse_foreign_code(location)
    with refusing(f"{location} holds no readable {'configuration' if location.gguf else 'config.json'}"):
        config = build_config(location.folder / location.gguf) if location.gguf else None
        config = config or AutoConfig.from_pretrained(**location.arguments)
        if location.gguf:
            complete_config(config, location.folder / location.gguf)
    return config


def read_tokenizer(location: Location) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights; a `CheckpointError` where there is none that can be read."""
    files = () if location.gguf else [location.folder / name for name in TOKENIZER_FILES]
    with refusing(f"{location} holds no readable tokenizer"), naming_broken(files):
        built = location.gguf and build_config(location.folder / location.gguf)
        # AutoTokenizer asks transformers for the configuration, which it makes none of for these files.
        kind: Any = PreTrainedTokenizerFast if built else AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(**location.arguments)
        if location.gguf:
            complete_tokenizer(tokenizer, location.folder / location.gguf)
        added_tokens(tokenizer)  # some mistakes in its settings come to light when it takes a text
    return tokenizer


def check_size(location: Location, config: PretrainedConfig, tensors: int) -> None:
    """Refuse a configuration of more decoder blocks than the files hold tensors, which would take hours to build.

    Raises `CheckpointError`.
    """
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(blocks, int) and blocks > tensors:
        raise CheckpointError(
            f"{location}: the configuration says {blocks} decoder blocks, where the files hold {tensors} tensors in all"
        )


def check_shape(place: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise a `CheckpointError` where a tensor has another shape than the network that a configuration makes."""
    if shape != expected:
        raise CheckpointError(f"{place} has shape {list(shape)} where the model's configuration needs {list(expected)}")


def is_language_model(kind: str) -> bool:
    """True for a model type that transformers opens as a causal language model."""
    return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING


def network_of(config: PretrainedConfig, location: Location, **options: Any) -> PreTrainedModel:
    """The network of a configuration, with weights at random or none; `options` are those of `from_config`.

    Raises a `CheckpointError` where transformers knows no language model of this kind.
    """
    own = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own:
        raise NoLanguageModelError(location, config.model_type)
    with refusing(f"{location} is no causal language model that transformers can build"):
        network: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=location.trust_remote_code, **options
        )
    return network


def read_network(location: Location, **options: Any) -> PreTrainedModel:
    """The network with the weights in its files of safetensors; `options` are those of `from_pretrained`.

    Raises a `CheckpointError` where transformers does not open it, or would make weights up that the files lack.
    """
    files = [location.folder / GENERATION]
    with _warnings_unless_refused(), refusing(f"{location} cannot be opened"), naming_broken(files):
        try:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                **location.arguments, output_loading_info=True, **options
            )
        except DashqError as error:  # of a result's own quantizer, which does not know its folder
            raise CheckpointError(f"{location} cannot be opened: {error}") from error
        network: PreTrainedModel = opened[0]
        loading: Mapping[str, set[str]] = opened[1]
        if missing := sorted(loading["missing_keys"]):
            raise CheckpointError(f"{location} lacks {len(missing)} tensors of its model, the first is {missing[0]}")
    return network


@contextmanager
def _warnings_unless_refused() -> Generator[None]:
    """Hold back what transformers says of the tensors it reads until the `with` statement ends, without an error."""
    logger, records = logging.getLogger("transformers.modeling_utils"), list[logging.LogRecord]()

    def hold(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
    for record in records:
        logger.handle(record)
