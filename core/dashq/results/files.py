"""Files of a result: written all or nothing, and removed by exact names."""

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dashq.errors import OutputError
from dashq.model.mappings import read_mapping

UNFINISHED = ".unfinished"
SEAL = "seal"  # the key of a digest of all else in a file of JSON


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, all or nothing; returns it."""
    with writing(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a file, all or nothing; returns it."""
    return write_bytes(path, text.encode(errors="backslashreplace"))  # names of files need not be UTF-8


def write_json(path: Path, content: Mapping[str, Any], indent: int | None = 1) -> Path:
    """Write a file of JSON, all or nothing; returns it. Without an `indent` Python encodes it many times faster."""
    return write_text(path, json.dumps(content, indent=indent))


def write_sealed(path: Path, content: Mapping[str, Any], indent: int | None = 1) -> Path:
    """Write a file of JSON, all or nothing, with a digest by which `read_sealed` knows what was written; returns it."""
    return write_json(path, {**content, SEAL: _seal(content)}, indent)


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a file of `write_sealed`; an `OSError` or `ValueError` where it cannot be read or has changed."""
    content = read_mapping(path)
    if content.pop(SEAL, None) != _seal(content):
        raise ValueError("its content is not what was written")
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def writing(path: Path, ending: str = UNFINISHED) -> Generator[Path]:
    """A temporary name to write a file to, which gets its own name when the `with` statement ends.

    It has an `ending` of its own where several processes may write the same file at a time. Raises an `OutputError`
    that names the file where the disk is full, the folder is gone, and the like.
    """
    temporary = path.with_name(f"{path.name}{ending}")
    try:
        yield temporary
        put_in_place(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def put_in_place(file: Path, path: Path) -> None:
    """Give a complete file its name, so that neither is lost with the power: its content reaches the disk first."""
    synchronize(file)
    os.replace(file, path)
    synchronize(path.parent)


def synchronize(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of these names, whole or unfinished. Nothing else is touched."""
    for name in sorted(names):
        for path in (folder / name, folder / f"{name}{UNFINISHED}"):
            if is_file_of(folder, path):
                path.unlink(missing_ok=True)


def is_file_of(folder: Path, path: Path) -> bool:
    """True for a file, or a link, that lies in a folder, whatever its name pretends."""
    try:
        return (path.is_file() or path.is_symlink()) and path.parent.resolve().is_relative_to(folder.resolve())
    except ValueError:  # a name with a NUL
        return False
