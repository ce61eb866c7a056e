"""A text begins with the tokens that its tokenizer puts there, or as the recipe says."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dashq.errors import TextError
from dashq.model.tokenizing import added_tokens, beginning_tokens
from pico import pico_tokenizer


def tokenizer(template: str = "$A", bos: str | None = None) -> PreTrainedTokenizerFast:
    """The pico tokenizer, which puts a text in the place of `$A`."""
    pico = pico_tokenizer()
    pico.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("</s>", 0)])
    pico.bos_token = bos
    return pico


@pytest.mark.parametrize(
    ("template", "before", "behind"),
    [
        ("$A", [], []),
        ("</s> $A", [0], []),
        ("$A </s>", [], [0]),
        ("</s> </s> $A </s>", [0, 0], [0]),
    ],
)
def test_tokens_before_and_behind_a_text_are_told_apart(template: str, before: list[int], behind: list[int]) -> None:
    assert added_tokens(tokenizer(template)) == (before, behind)


@pytest.mark.parametrize("template", ["$A", "</s> $A", "</s> </s> $A </s>"])
def test_samples_begin_as_the_tokenizer_begins_texts_unless_the_recipe_says_otherwise(template: str) -> None:
    before, _ = added_tokens(tokenizer(template))
    assert beginning_tokens(tokenizer(template, bos="</s>"), "auto") == before
    assert beginning_tokens(tokenizer(template, bos="</s>"), False) == []
    assert beginning_tokens(tokenizer(template, bos="</s>"), True) == (before or [0])


def test_a_beginning_that_the_tokenizer_has_not_is_refused_where_there_shall_be_one() -> None:
    assert beginning_tokens(tokenizer(), "auto") == []
    assert beginning_tokens(tokenizer("</s> $A"), True) == [0]
    with pytest.raises(TextError, match=r"^`beginning: true`, but the tokenizer has no token for the beginning"):
        beginning_tokens(tokenizer(), True)
