"""The text model inside a model that also takes images or sounds, as if the files held nothing else."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dashq.model.source import Header, Source
from dashq.model.transformers_internals import get_model_conversion_mapping

# By its name in the whole model, or, in older files of some, without one.
TEXT = re.compile(r"(model\.)?language_model\.|model\.(embed_tokens|layers|norm)\.|lm_head\.")
# The beginnings of its tensors' names, which older files have the other way round, and those in a model of text alone.
NAMES = {r"^(?:model\.language_model|language_model\.model)\.": "model.", r"^language_model\.lm_head\.": "lm_head."}

# Text models that transformers opens as part of the whole alone, and those that compute the same with text: the three
# positions that tokens have there are one. In these configurations stands what tells them apart.
SAME_WITH_TEXT = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
SECTIONS, SEEING = "mrope_section", "deepstack_visual_indexes"


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
    if text.model_type in SAME_WITH_TEXT:
        text = _with_one_position(text, config)
    text.dtype, text.tie_word_embeddings = config.dtype or text.dtype, config.tie_word_embeddings
    return text


def _with_one_position(text: PretrainedConfig, whole: Any) -> PretrainedConfig:
    """The configuration of the type that computes the same with text.

    It keeps the `mrope_section`, the columns of each of a token's positions, and the `deepstack_visual_indexes`, the
    layers of the tower that the first decoder blocks are given as well.
    """
    settings = text.to_dict()
    kind = SAME_WITH_TEXT[settings.pop("model_type")]
    rope = settings.pop("rope_parameters")
    settings[SECTIONS] = rope.pop(SECTIONS)
    rope.pop("mrope_interleaved", None)
    if layers := getattr(whole.vision_config, SEEING, ()):
        settings[SEEING] = list(layers)
    plain: PretrainedConfig = AutoConfig.for_model(kind, rope_parameters=rope, **settings)
    return plain
