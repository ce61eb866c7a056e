"""The tokens around a text are found by trying the tokenizer."""

import pytest
from tokenizers import processors

from dashq.errors import TextError
from dashq.model.tokenizing import added_tokens, beginning_tokens
from pico import beginning_tokenizer, pico_tokenizer


@pytest.mark.parametrize(
    ("around", "before", "behind"),
    [("$A", [], []), ("<s> $A", ["<s>"], []), ("$A </s>", [], ["</s>"]), ("<s> <s> $A </s>", ["<s>", "<s>"], ["</s>"])],
)
def test_tokens_before_and_behind_are_found(around: str, before: list[str], behind: list[str]) -> None:
    tokenizer = beginning_tokenizer()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=around, pair="$A $B", special_tokens=ids
    )
    tokens = [tokenizer.convert_tokens_to_ids(part) for part in (before, behind)]
    assert [*added_tokens(tokenizer)] == tokens


def test_auto_is_as_the_tokenizer_does_and_true_wants_a_token() -> None:
    own, other = beginning_tokenizer("<s>"), beginning_tokenizer()
    ids = [own.bos_token_id]
    assert [beginning_tokens(own, value) for value in ("auto", True, False)] == [ids, ids, []]  # type: ignore[arg-type]
    assert beginning_tokens(other, "auto") == []
    assert beginning_tokens(other, True) == [other.bos_token_id]
    with pytest.raises(TextError, match="no token for the beginning of a text"):
        beginning_tokens(pico_tokenizer(), True)
