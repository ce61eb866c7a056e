"""Folders that tests share, also from process to process."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def written_once(folder: Path, write: Callable[[Path], object]) -> Path:
    """The folder, which `write` fills where no other test has: of several processes the others wait for the first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(f"{folder.name}.done")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            write(folder)
            done.touch()
    return folder
