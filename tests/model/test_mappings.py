"""Mappings are read from files that anybody may have written."""

from pathlib import Path

import pytest
import yaml

from dashq.model.mappings import mapping_or_empty, naming_broken, read_mapping


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"null", "it holds NoneType, not a mapping"),
        (b"[]", "it holds list, not a mapping"),
        (b'{"a": "\xe9"}', "it is not UTF-8 text"),
        (b"[" * 100_000, "it is nested too deep"),
        (b"{", "Expecting property name"),
    ],
)
def test_content_that_is_no_mapping_is_refused_with_the_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        read_mapping(tmp_path / "file")
    assert mapping_or_empty(tmp_path / "file") == {}


def test_a_mapping_comes_back(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": [1, null]}', encoding="utf-8")
    assert read_mapping(tmp_path / "file") == mapping_or_empty(tmp_path / "file") == {"a": [1, None]}


def test_other_kinds_of_text_are_read_with_their_own_parser(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a: é", encoding="utf-8")
    assert read_mapping(tmp_path / "file", yaml.safe_load) == {"a": "é"}


def test_an_absent_file_is_an_error_or_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_mapping(tmp_path / "absent")
    assert mapping_or_empty(tmp_path / "absent") == {}


def test_a_program_that_fails_at_a_broken_file_is_told_with_the_files_name(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("absent.json", "good.json", "broken.json")]
    paths[1].write_text("{}")
    paths[2].write_text("[]")
    with pytest.raises(ValueError, match=r"^broken\.json: it holds list, not a mapping$"), naming_broken(paths):
        raise AttributeError("'list' object has no attribute 'pop'")
    with pytest.raises(AttributeError, match="of something else"), naming_broken(paths[:2]):
        raise AttributeError("of something else")
    with naming_broken(paths):  # nothing failed
        pass
