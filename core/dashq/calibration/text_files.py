"""Local text files: read in part where they are large, and never more than a bounded part of a packed one."""

import io
import json
import stat
from array import array
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dashq.calibration.documents import PIECE, WHOLE, Documents, Listed, check_choice
from dashq.errors import TextError, cause

LARGEST = 2**30  # bytes of a file that has to be in memory as a whole, unpacked, and of a line
MOST_VALUES = 10**8  # of a column
PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}


class TextFile:
    """The bytes of a local file; those of a packed one are unpacked into memory, `LARGEST` at most.

    `ending` is that of the file's name, of a packed one that before the last.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._require_a_file()
        endings = [suffix.lower() for suffix in path.suffixes]
        codec = PACKED.get(endings[-1]) if endings else None
        self.ending = "".join(endings[-2:-1] if codec else endings[-1:])
        self._content = self._unpacked(codec) if codec else None
        self.size = self.path.stat().st_size if self._content is None else len(self._content)

    def _require_a_file(self) -> None:
        try:
            mode = self.path.stat().st_mode
        except FileNotFoundError as error:
            raise TextError(f"there is no file {self.path}") from error
        except (OSError, ValueError) as error:  # too long a name, a NUL in it, a loop of links
            raise TextError(f"there can be no file {str(self.path)[:100]!r}: {error}") from error
        if not stat.S_ISREG(mode):
            raise TextError(f"{self.path} is no file but a folder, a pipe or a device")

    @contextmanager
    def opened(self) -> Generator[BinaryIO]:
        """The bytes as a file, for the duration of the `with` statement."""
        if self._content is not None:
            yield io.BytesIO(self._content)
            return
        try:
            with self.path.open("rb") as file:
                yield file
        except OSError as error:
            raise self.unreadable(error) from error

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        with self.opened() as file:
            file.seek(start)
            return file.read(stop - start)

    def text(self, start: int, stop: int) -> str:
        """The text of these bytes, its lines ended by a plain newline."""
        try:
            text = self.read(start, stop).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.unreadable(error) from error
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def whole(self) -> bytes:
        """All bytes, where they are few enough to be in memory together."""
        if self.size > LARGEST:
            raise TextError(f"{self.path} has more than the {LARGEST:,} bytes that are read of such a file: split it")
        return self.read(0, self.size)

    def unreadable(self, error: Exception) -> TextError:
        """The error of a file that is broken, or that may not be read."""
        return TextError(f"cannot read {self.path}: {cause(error)}")

    def _unpacked(self, codec: str) -> bytes:
        import pyarrow

        try:
            with self.path.open("rb") as file, pyarrow.CompressedInputStream(file, codec) as stream:
                content: bytes = stream.read(LARGEST + 1)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise self.unreadable(error) from error
        if len(content) > LARGEST:
            raise TextError(f"{self.path} unpacks to more than the {LARGEST:,} bytes that are read of it: unpack it")
        return content


class Pieces(Documents):
    """A long text in pieces of about `PIECE` bytes that begin and end with a line, where lines are not longer."""

    separator = ""

    def __init__(self, file: TextFile) -> None:
        self._file = file

    def __len__(self) -> int:
        return -(-self._file.size // PIECE)

    def __getitem__(self, index: Any) -> str:
        return self._file.text(self._start(index), self._start(index + 1))

    def place(self, index: int) -> str:
        return f"{self._file.path}, from byte {self._start(index)}"

    def _start(self, index: int) -> int:
        """The first line, or letter of a long line, that begins at `index` times `PIECE` bytes or behind."""
        start = index * PIECE
        if start == 0 or start >= self._file.size:
            return min(start, self._file.size)
        piece = self._file.read(start, start + PIECE)
        newline = piece.find(b"\n")
        if newline >= 0:
            return start + newline + 1
        return start + next((n for n, byte in enumerate(piece[:4]) if byte & 0xC0 != 0x80), 0)


class Lines(Documents):
    """The lines of JSON of a file, blank ones left out; small files are checked as a whole."""

    def __init__(self, file: TextFile, field: str) -> None:
        self._file, self._field = file, field
        self._starts, self._lengths, self._numbers = array("Q"), array("Q"), array("Q")
        start = 0
        with file.opened() as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LARGEST), b""), 1):
                if len(line) == LARGEST:
                    raise TextError(f"{file.path}, line {number} is longer than {LARGEST:,} bytes")
                if line.strip():
                    self._starts.append(start)
                    self._lengths.append(len(line))
                    self._numbers.append(number)
                start += len(line)
        if file.size <= WHOLE:
            list(self)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        start = self._starts[index]
        line = self._file.text(start, start + self._lengths[index])
        return _in_field(_parse(line, self._file.path, self._numbers[index]), self._field, self.place(index))

    def place(self, index: int) -> str:
        return f"{self._file.path}, line {self._numbers[index]}"


class Rows(Documents):
    """A column of a table, whose values become Python's one by one."""

    def __init__(self, column: Any, path: Path) -> None:
        self._column, self._path = column, path

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[index].as_py()

    def place(self, index: int) -> str:
        return f"{self._path}, row {index + 1}"


def read_file(path: Path, field: str) -> Documents:
    """The documents of a local file, by its ending; `field` is the key or column that holds them.

    Raises a `TextError` where there is no such file, its kind is not known, or it is broken.
    """
    file = TextFile(path)
    if file.ending not in READERS:
        known = f"{', '.join(READERS)}, packed as {', '.join(PACKED)} or not"
        raise TextError(f"{file.path}: files that end so are not read. Known are: {known}")
    return READERS[file.ending](file, field)


def _read_text(file: TextFile, field: str) -> Documents:
    if file.size > WHOLE:
        return Pieces(file)
    return Listed([file.text(0, file.size)], str(file.path))


def _read_list(file: TextFile, field: str) -> Documents:
    file.whole()
    records = _only_list(_parse(file.text(0, file.size), file.path, 1), file.path)
    listed = Listed(records, str(file.path), "record")
    contents = [_in_field(record, field, listed.place(index)) for index, record in enumerate(records)]
    return Listed(contents, str(file.path), "record")


def _read_table(file: TextFile, field: str, delimiter: str) -> Documents:
    import pyarrow
    from pyarrow import csv

    content = file.whole()
    parsing = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    reading = csv.ReadOptions(block_size=max(1, len(content)))
    converting = csv.ConvertOptions(column_types={field: pyarrow.string()}, include_columns=[field])
    try:
        with csv.open_csv(pyarrow.BufferReader(content), reading, parsing) as head:
            check_choice("field", field, head.schema.names, str(file.path))
        column = csv.read_csv(pyarrow.BufferReader(content), reading, parsing, converting)[field]
    except (ValueError, pyarrow.ArrowException) as error:
        raise file.unreadable(error) from error
    return Rows(column, file.path)


def _read_parquet(file: TextFile, field: str) -> Documents:
    import pyarrow
    from pyarrow import parquet

    try:
        with file.opened() as opened:
            table = parquet.ParquetFile(opened)
            check_choice("field", field, table.schema_arrow.names, str(file.path))
            groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
            leaves = [
                column
                for group in groups
                for column in map(group.column, range(group.num_columns))
                if column.path_in_schema.split(".")[0] == field
            ]
            if (
                sum(c.total_uncompressed_size for c in leaves) > LARGEST
                or sum(c.num_values for c in leaves) > MOST_VALUES
            ):
                raise TextError(
                    f"{file.path}: the field {field!r} has more than the {LARGEST:,} bytes or {MOST_VALUES:,} values "
                    "that are read of such a file: split it"
                )
            # A text that stands in many rows is in memory once.
            texts = sorted({leaf.path_in_schema for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"})
            column = parquet.ParquetFile(opened, read_dictionary=texts).read(columns=[field])[field]
    except (ValueError, pyarrow.ArrowException) as error:
        raise file.unreadable(error) from error
    return Rows(column, file.path)


READERS: Mapping[str, Callable[[TextFile, str], Documents]] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": Lines,
    ".json": _read_list,
    ".csv": lambda file, field: _read_table(file, field, ","),
    ".tsv": lambda file, field: _read_table(file, field, "\t"),
    ".parquet": _read_parquet,
}


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise TextError(f"{path}, line {line}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise TextError(f"{path}, line {first_line}: not JSON that can be read: {error}") from error


def _in_field(record: Any, field: str, place: str) -> Any:
    """The document in a record: the value of an object's field, or the record itself where it is no object."""
    if not isinstance(record, dict):
        return record
    check_choice("field", field, list(record), place)
    return record[field]


def _only_list(content: Any, path: Path) -> list[Any]:
    """The records of a .json file: its list, or the only list in its object."""
    values = content.values() if isinstance(content, dict) else [content]
    lists = [value for value in values if isinstance(value, list)]
    if len(lists) != 1:
        raise TextError(f"{path} must hold a list, or an object with one list; it has {len(lists)} lists")
    return lists[0]
