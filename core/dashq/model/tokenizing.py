"""The tokens that a tokenizer puts before and behind every text."""

from typing import TYPE_CHECKING, Any, Literal

from dashq.errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "the"  # any text will do


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The special tokens before a text and those behind it, found by trying: settings say it in many ways."""
    plain = list(tokenizer.encode(_PROBE, add_special_tokens=False))
    whole = list(tokenizer.encode(_PROBE, add_special_tokens=True))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []  # special tokens that change how the text itself is cut cannot be told from it


def beginning_tokens(tokenizer: "PreTrainedTokenizerBase", beginning: Literal["auto"] | bool) -> list[int]:
    """The tokens that samples and windows begin with: as the tokenizer begins texts, always, or never.

    Raises a `TextError` where there shall be one and the tokenizer has none.
    """
    if beginning is False:
        return []
    before, _ = added_tokens(tokenizer)
    if before or beginning == "auto":
        return before
    first: Any = tokenizer.bos_token_id  # its annotation allows for lists
    if first is None:
        raise TextError("`beginning: true`, but the tokenizer has no token for the beginning of a text: use auto")
    return [first]
