"""Files of a result: written all or nothing, and removed by exact names."""

import json
import os
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dashq.errors import OutputError

UNFINISHED = ".unfinished"


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, all or nothing; returns it."""
    with writing(path) as temporary:
        temporary.write_bytes(content)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a file, all or nothing; returns it."""
    return write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a file of JSON, all or nothing; returns it."""
    return write_text(path, json.dumps(content, indent=1))


@contextmanager
def writing(path: Path) -> Generator[Path]:
    """A temporary name to write a file to, which gets its own name when the `with` statement ends.

    Raises an `OutputError` that names the file where the disk is full, the folder is gone, and the like.
    """
    temporary = path.with_name(f"{path.name}{UNFINISHED}")
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
