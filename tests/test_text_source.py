"""A source of text is a name, or a name and what is to be taken of it."""

import pytest
from pydantic import TypeAdapter, ValidationError

from dashq.text_source import Sources, TextSource

SOURCES = TypeAdapter(Sources)


def test_one_name_and_a_list_of_sources_are_both_a_tuple() -> None:
    assert SOURCES.validate_python("pydoc") == (TextSource(name="pydoc"),)
    assert SOURCES.validate_python({"name": "c4", "weight": 2}) == (TextSource(name="c4", weight=2),)
    assert SOURCES.validate_python(["pydoc", {"name": "c4"}]) == (TextSource(name="pydoc"), TextSource(name="c4"))


@pytest.mark.parametrize("sources", [[], {}, {"name": "c4", "weight": 0}, 3])
def test_none_and_no_sources_are_refused(sources: object) -> None:
    with pytest.raises(ValidationError):
        SOURCES.validate_python(sources)
