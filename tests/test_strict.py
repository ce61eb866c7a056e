"""A record that knows its keys: a misspelt one is an error that says what was possible."""

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dashq.strict import Strict, guess, mistake


class Inner(Strict):
    size: int = 1


class Record(Strict):
    renamed_keys: ClassVar[Mapping[str, str]] = {"grain": "`chunk`", "old": "`chunk`"}

    bits: int
    chunk: int = 4
    inner: Inner = Inner()


class Empty(Strict):
    pass


def messages(record: type[Strict], data: Any) -> dict[tuple[str | int, ...], str]:
    with pytest.raises(ValidationError) as error:
        record.model_validate(data)
    return {entry["loc"]: entry["msg"] for entry in error.value.errors()}


def test_known_keys_are_taken_and_those_that_are_missing_have_their_defaults() -> None:
    assert Record.model_validate({"bits": 2}) == Record(bits=2, chunk=4, inner=Inner(size=1))
    assert Record(bits=2, chunk=8).chunk == 8


def test_an_unknown_key_is_refused_with_the_nearest_guess_and_all_that_is_allowed() -> None:
    allowed = "Allowed here: bits, chunk, inner"
    assert messages(Record, {"bit": 2}) == {("bit",): f"unknown key 'bit'. Did you mean 'bits'? {allowed}"}
    assert messages(Record, {"bits": 2, "zzz": 1}) == {("zzz",): f"unknown key 'zzz'. {allowed}"}
    assert messages(Empty, {"bits": 2}) == {("bits",): "unknown key 'bits'. Allowed here: no keys at all"}


def test_all_unknown_keys_are_told_at_once_and_where_they_stand() -> None:
    assert messages(Record, {"bits": 2, "one": 1, "two": 2}).keys() == {("one",), ("two",)}
    assert messages(Record, {"bits": 2, "inner": {"sise": 3}}) == {
        ("inner", "sise"): "unknown key 'sise'. Did you mean 'size'? Allowed here: size"
    }


@pytest.mark.parametrize("key", ["grain", "old"])
def test_a_key_of_an_earlier_version_is_refused_with_its_name_now(key: str) -> None:
    assert messages(Record, {"bits": 2, key: 1}) == {(key,): f"unknown key '{key}': it is called `chunk` now"}


@given(st.text())
def test_no_key_but_its_own_is_ever_accepted(key: str) -> None:
    if key in Record.model_fields:
        assert Record.model_validate({"bits": 2, key: Record(bits=2).model_dump()[key]}).bits == 2
    else:
        assert messages(Record, {"bits": 2, key: 1})[(key,)].startswith(f"unknown key {key!r}")


def test_a_key_that_is_no_word_is_refused_in_words() -> None:
    assert messages(Record, {"bits": 2, 7: 1})[("7",)].startswith("unknown key '7'. Allowed here: ")


def test_a_default_that_is_none_of_the_possible_values_is_an_error_too() -> None:
    class Wrong(Strict):
        bits: int = "many"  # type: ignore[assignment]

    assert messages(Wrong, {}).keys() == {("bits",)}


def test_a_record_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Record(bits=2).bits = 3


@pytest.mark.parametrize(
    ("word", "sentence"),
    [("contigous", " Did you mean 'contiguous'?"), ("chanel", " Did you mean 'channel'?"), ("rtn", ""), ("", "")],
)
def test_a_guess_is_made_only_where_a_choice_is_near(word: str, sentence: str) -> None:
    assert guess(word, ["contiguous", "channel"]) == sentence
    assert guess(word, []) == ""


@given(st.text())
def test_the_words_of_a_mistake_arrive_as_they_are_braces_included(words: str) -> None:
    error = ValidationError.from_exception_data("recipe", [mistake("key", words, 7)])
    assert [(entry["loc"], entry["msg"], entry["input"]) for entry in error.errors()] == [(("key",), words, 7)]
