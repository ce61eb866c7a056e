"""The tokens that a model can take: no more at a time than it has positions, and none beyond its embeddings."""

from collections.abc import Iterable
from typing import Any

from jaxtyping import Int64
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dashq.errors import TextError


def check_length(length: int, config: PretrainedConfig, wish: str) -> None:
    """Raise a `TextError` where `length` tokens are more than the model has positions; `wish` names the setting."""
    positions = positions_of(config)
    if positions is not None and length > positions:
        raise TextError(f"{wish} {length} is more than the {positions} positions of the model: lower it to {positions}")


def usual_length(length: int, configs: Iterable[PretrainedConfig]) -> int:
    """The length for samples where none is asked for: no more than one of the models has positions."""
    return min([length, *(positions for config in configs if (positions := positions_of(config)) is not None)])


def check_tokens(
    tokens: Int64[Tensor, "rows tokens"], config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise a `TextError` where the text has a token that the model's embeddings do not reach."""
    size: int = config.get_text_config().vocab_size
    largest = int(tokens.max())
    if largest >= size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise TextError(
            f"the text holds the token {token!r} of number {largest}, and the model's embeddings end at {size - 1}: "
            f"enlarge them with `model.resize_token_embeddings({len(tokenizer)})`, or use a text without such tokens"
        )


def positions_of(config: PretrainedConfig) -> int | None:
    """The most tokens that a model can take at a time; None where its configuration sets no limit.

    Rotary embeddings that are stretched reach as far as their factor says, unless the limit counts that already. A
    sliding window limits what a token attends to, and not how many tokens there are.
    """
    text: Any = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if not isinstance(limit, int):
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # one, or one for each kind of layer
    stretched = [
        kind["factor"] * kind.get("original_max_position_embeddings", limit)
        for kind in kinds
        if isinstance(kind.get("factor"), int | float)
    ]
    return max([limit, *map(int, stretched)])
