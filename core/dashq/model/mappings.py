"""Mappings in files that anybody may have written: of JSON, or of any other text that parses to one."""

import json
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read_mapping(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """The mapping in a file, of JSON unless `parse` reads another kind; an `OSError` or `ValueError` says why not.

    Errors that `parse` raises pass unchanged.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8 text") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"it holds {type(content).__name__}, not a mapping")
    return content


@contextmanager
def naming_broken(paths: Iterable[Path]) -> Generator[None]:
    """Turn whatever is raised inside into a `ValueError` that names the file which holds no mapping, where one does.

    For programs that read these files themselves, and fail in any way where they hold something else.
    """
    try:
        yield
    except Exception as error:
        for path in paths:
            if path.is_file():
                try:
                    read_mapping(path)
                except (OSError, ValueError) as reason:
                    raise ValueError(f"{path.name}: {reason}") from error
        raise


def mapping_or_empty(path: Path) -> dict[str, Any]:
    """The mapping in a file of JSON; empty where the file is absent or holds anything else."""
    try:
        return read_mapping(path)
    except (OSError, ValueError):
        return {}
