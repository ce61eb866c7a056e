"""The text model inside a model that also takes images or sounds, as if the files held nothing else."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from dashq.model.source import Header, Source
from dashq.model.transformers_internals import get_model_conversion_mapping

TEXT = re.compile(r"(model\.)?language_model\.|lm_head\.")
# The beginnings of its tensors' names, which older files have the other way round, and those in a model of text alone.
NAMES = {r"^(?:model\.language_model|language_model\.model)\.": "model.", r"^language_model\.lm_head\.": "lm_head."}


class TextPart(Source):
    """The tensors of the text model in another source; `elsewhere` says where programs take the others from."""

    def __init__(self, source: Source, elsewhere: str) -> None:
        self._source, self._elsewhere = source, elsewhere
        headers = source.headers()
        self._headers = {key: header for key, header in headers.items() if TEXT.match(key)}
        self._others = headers.keys() - self._headers.keys()

    @property
    def notes(self) -> Iterable[str]:
        yield from self._source.notes
        if self._others:
            parts = sorted({key.removeprefix("model.").partition(".")[0] for key in self._others})
            yield (
                f"the result holds only the text model, without {len(self._others)} tensors of "
                f"{', '.join(parts)}: {self._elsewhere}"
            )

    def headers(self) -> Mapping[str, Header]:
        return self._headers

    def lazy(self, keys: list[str]) -> Mapping[str, Any]:
        return self._source.lazy(keys)

    def conversions(self, network: PreTrainedModel) -> list[Any]:
        return get_model_conversion_mapping(network, NAMES)


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text model; of its weights' type, and of a tied head, the whole model's decides."""
    text: PretrainedConfig = config.get_text_config()
    text.dtype, text.tie_word_embeddings = config.dtype or text.dtype, config.tie_word_embeddings
    return text
