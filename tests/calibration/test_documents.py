"""Long texts are taken in pieces, and texts are joined to one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashq.calibration import documents
from dashq.calibration.documents import Listed, in_pieces, joined

TEXTS = st.lists(st.text("ab\n", max_size=60), max_size=8)


@pytest.fixture(scope="module", autouse=True)
def _small_pieces() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "WHOLE", 50)
        patch.setattr(documents, "PIECE", 10)
        yield


@given(st.text("ab\n"))
def test_pieces_are_the_text_and_end_with_a_line(text: str) -> None:
    pieces = list(in_pieces(text))
    assert "".join(pieces) == text
    assert all(10 <= len(piece) <= 20 for piece in pieces[:-1])
    for piece in pieces[:-1]:
        assert piece.endswith("\n") or len(piece) == 10


@given(TEXTS)
def test_joined_texts_are_the_text_that_joining_gives(texts: list[str]) -> None:
    whole, pieces = "\n\n".join(texts), list(joined(texts, "\n\n"))
    assert "".join(pieces) == whole
    assert len(pieces) == 1 or len(whole) > 50


def test_a_document_alone_is_named_by_its_source() -> None:
    assert Listed(["one"], "a.txt").place(0) == "a.txt"
    assert Listed(["one", "two"], "a.json", "record").place(1) == "a.json, record 2"
