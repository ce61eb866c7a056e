"""Local files of text are read by their endings, in part where they are large, and named where they are broken."""

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dashq.calibration import documents, text_files
from dashq.calibration.sources import read_documents
from dashq.calibration.text_files import read_file
from dashq.errors import TextError
from dashq.text_source import TextSource
from texts import CHAT


@pytest.mark.parametrize(
    ("file", "content", "documents"),
    [
        ("a.TXT", "one\n\ntwo\n", ["one\n\ntwo\n"]),
        ("a.jsonl", '{"text": "one", "id": 1}\n\n"two"\n', ["one", "two"]),
        ("a.jsonl", '"one\u2028still one"', ["one\u2028still one"]),
        ("a.json", '["one", {"text": "two"}]', ["one", "two"]),
        ("a.json", '{"version": 1, "data": [{"text": "one"}]}', ["one"]),
        ("a.json", json.dumps([{"text": CHAT}]), [CHAT]),
    ],
)
def test_local_files(tmp_path: Path, file: str, content: str, documents: list[Any]) -> None:
    (tmp_path / file).write_text(content, encoding="utf-8")
    assert list(read_documents(TextSource(name=str(tmp_path / file)))) == documents


def test_parquet_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", "two"], "chat": [CHAT, CHAT]}), path)
    assert list(read_documents(TextSource(name=str(path), field="body"))) == ["one", "two"]
    assert list(read_documents(TextSource(name=str(path), field="chat"))) == [CHAT, CHAT]
    with pytest.raises(TextError, match=r"a\.parquet has no field 'bodi'. Did you mean 'body'\? It has: body, chat"):
        read_documents(TextSource(name=str(path), field="bodi"))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\xff", "cannot read .*utf-8"),
        ("a.jsonl", b'"one"\n\n{"text": two}\n', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"txt": "two"}', r"a\.jsonl, line 2 has no field 'text'.*It has: txt"),
        ("a.json", b'[\n"one",\n}', r"a\.json, line 3: not JSON"),
        ("a.json", b'{"a": [], "b": []}', "one list; it has 2"),
        ("a.parquet", b"one", "cannot read .*a.parquet"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_documents(TextSource(name=str(tmp_path / file)))


def test_absent_file_is_named_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=re.escape(str(tmp_path / "absent.txt"))):
        read_documents(TextSource(name="absent.txt"))


CONTENTS = {
    ".txt": "one",
    ".md": "one",
    ".jsonl": '{"text": "one"}\n"two"\n',
    ".json": '["one", "two"]',
    ".csv": 'id,text\n1,"one, and\nmore"\n2,two\n',
    ".tsv": "id\ttext\n1\tone\n2\ttwo\n",
}
PACKERS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


@pytest.mark.parametrize("packed", ["", *PACKERS])
@pytest.mark.parametrize("ending", CONTENTS)
def test_every_known_ending_is_read_packed_or_not(tmp_path: Path, ending: str, packed: str) -> None:
    path, content = tmp_path / f"texts{ending}{packed}", CONTENTS[ending].encode()
    if packed:
        with path.open("wb") as file, pyarrow.CompressedOutputStream(file, PACKERS[packed]) as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    first = "one, and\nmore" if ending == ".csv" else "one"
    assert list(read_file(path, "text")) == ([first] if ending in (".txt", ".md") else [first, "two"])


@pytest.mark.parametrize("name", ["a.docx", "a", "a.pdf.gz", "a.gz"])
def test_other_endings_are_refused_with_those_that_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"one"))
    with pytest.raises(TextError, match=rf"{re.escape(name)}: .* Known are: \.txt, .*\.parquet, packed as \.gz"):
        read_file(tmp_path / name, "text")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.jsonl", b'"one"\n[' + b"[" * 100_000, r"a\.jsonl, line 2: not JSON that can be read: .*recursion"),
        ("a.json", b"[" + b"9" * 10_000 + b"]", r"a\.json, line 1: not JSON that can be read: .*digits"),
        ("a.csv", b"id,body\n1,one\n", r"a\.csv has no field 'text'\. It has: id, body"),
        ("a.csv", b"text\n\xff\n", r"cannot read .*a\.csv: .*UTF8"),
        ("a.csv", b"id,text\n1\n", r"cannot read .*a\.csv: .*Expected 2 columns"),
        ("a.csv", b"", r"cannot read .*a\.csv"),
        ("a.txt.gz", b"one", r"cannot read .*a\.txt\.gz"),
    ],
)
def test_broken_content_is_named_in_one_line(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(TextError, match=message) as error:
        read_file(tmp_path / file, "text")
    assert "\n" not in str(error.value)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    for path in (tmp_path / "a.txt", Path("/dev/zero"), tmp_path):
        with pytest.raises(TextError, match=f"{path} is no file but a folder, a pipe or a device"):
            read_file(path, "text")


def test_a_small_file_that_unpacks_to_a_huge_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LARGEST", 100)
    for name, size in (("whole.txt.gz", 100), ("bomb.txt.gz", 101)):
        (tmp_path / name).write_bytes(gzip.compress(b"x" * size))
    assert list(read_file(tmp_path / "whole.txt.gz", "text")) == ["x" * 100]
    with pytest.raises(TextError, match="unpacks to more than the 100 bytes that are read of it: unpack it"):
        read_file(tmp_path / "bomb.txt.gz", "text")


@pytest.mark.parametrize("file", ["a.json", "a.csv", "a.tsv"])
def test_what_has_to_be_in_memory_is_bounded(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LARGEST", 8)
    (tmp_path / file).write_text('["one", "two"]')
    with pytest.raises(TextError, match=f"{file} has more than the 8 bytes that are read of such a file: split it"):
        read_file(tmp_path / file, "text")


def test_a_line_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LARGEST", 20)
    (tmp_path / "a.jsonl").write_text('"one"\n"' + "x" * 30 + '"\n')
    with pytest.raises(TextError, match=r"a\.jsonl, line 2 is longer than 20 bytes"):
        read_file(tmp_path / "a.jsonl", "text")


def test_a_text_in_many_rows_of_a_parquet_file_is_in_memory_once(tmp_path: Path) -> None:
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 50_000), pyarrow.array(["y" * 100_000]))  # 5 GB
    chats = [[{"role": "user", "content": "x" * 1000}]] * 1000
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": text, "id": range(50_000)}), path, store_schema=False)
    before = pyarrow.total_allocated_bytes()
    rows = read_file(path, "text")
    assert pyarrow.total_allocated_bytes() - before < 10**6
    assert (len(rows), rows[49_999], rows.place(7)) == (50_000, "y" * 100_000, f"{path}, row 8")
    parquet.write_table(pyarrow.table({"chat": chats}), path)
    assert list(read_file(path, "chat")) == chats


@pytest.mark.parametrize(("limit", "value"), [("LARGEST", 1000), ("MOST_VALUES", 99)])
def test_a_column_of_a_parquet_file_is_bounded(
    tmp_path: Path, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write_table(
        pyarrow.table({"text": [f"text {number:050}" for number in range(100)]}), tmp_path / "a.parquet"
    )
    read_file(tmp_path / "a.parquet", "text")
    monkeypatch.setattr(text_files, limit, value)
    with pytest.raises(TextError, match=r"a\.parquet: the field 'text' has more than the .* split it"):
        read_file(tmp_path / "a.parquet", "text")


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents, text_files):
        monkeypatch.setattr(module, "WHOLE", 50)
        monkeypatch.setattr(module, "PIECE", 16)


@pytest.mark.parametrize("letters", ["é", "é\n", "x" * 40 + "\n", "xy\n", "😀", "ab\r\n"])
def test_the_pieces_of_a_long_file_are_the_file(tmp_path: Path, letters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    (tmp_path / "a.txt").write_bytes((letters * 60).encode())
    pieces = read_file(tmp_path / "a.txt", "text")
    assert "".join(pieces) == letters.replace("\r", "") * 60
    assert len(pieces) > 3
    if len(letters) < 10 and "\n" in letters:
        assert all(piece.endswith("\n") for piece in pieces)
    assert pieces.place(0) == f"{tmp_path / 'a.txt'}, from byte 0"


def test_of_a_long_file_of_lines_only_those_asked_for_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_pieces(monkeypatch)
    (tmp_path / "a.jsonl").write_text('"one"\n\n' * 20 + "broken\n" + '{"text": "two"}\r\n')
    lines = read_file(tmp_path / "a.jsonl", "text")
    assert (len(lines), lines[0], lines[21], lines.place(20)) == (22, "one", "two", f"{tmp_path / 'a.jsonl'}, line 41")
    with pytest.raises(TextError, match=r"a\.jsonl, line 41: not JSON"):
        lines[20]
