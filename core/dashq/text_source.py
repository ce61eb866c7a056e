"""A source of text, as recipes name it."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from dashq.strict import Strict, as_tuple, shown


class TextSource(Strict):
    """A source of text; a bare string stands for its `name`.

    `name` is "pydoc" (the documentation inside Python), "wikitext2", "c4", a local file of text, JSON or a table,
    or a dataset on the Hugging Face hub such as "org/name". `subset` and `split` choose within a dataset; a
    local file is read whole. `field` is the column with the text, `weight` the share in a mix of sources. `chat`
    puts each document, a list of messages or a text that a user says, through the tokenizer's chat template.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    weight: PositiveFloat = Field(default=1.0, allow_inf_nan=False)
    chat: bool = False

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_name(cls, data: Any) -> Any:
        if not isinstance(data, str | Mapping | TextSource):
            possible = "the name of a text, a mapping with a `name`, or a list of these"
            raise ValueError(f"should be {possible}, not {shown(data)}")
        return {"name": data} if isinstance(data, str) else data


Sources = Annotated[
    tuple[TextSource, ...],
    BeforeValidator(as_tuple, str | TextSource | list[str | TextSource]),
    Field(min_length=1),
]
