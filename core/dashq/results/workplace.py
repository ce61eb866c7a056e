"""The folder that a run works in: the output itself, or one beside an earlier result until it can take its place."""

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from dashq.errors import OutputError
from dashq.results.files import remove_files, synchronize
from dashq.results.folder import (
    ANALYSIS,
    JOURNAL,
    MEASURING,
    NEXT,
    PREVIOUS,
    check_folder,
    earlier_files,
    is_finished,
    make_folder,
    remove_leftovers,
)
from dashq.results.lock import LOCK, locked
from dashq.results.report import REPORT


@contextmanager
def workplace(output: Path, overwrite: bool, format_files: Iterable[str] = ()) -> Generator[Path]:
    """The folder to write a result in, which is in its place when the `with` statement ends without an error.

    It is the output itself, or, where that holds a finished result to be replaced, a folder beside it. Raises an
    `OutputError` where the output is not ours, is not to be replaced, cannot be written to, or is another run's.
    """
    place, format_files = Path(os.path.realpath(output)), tuple(format_files)
    _finish_replacement(place, format_files)
    check_folder(place, format_files)
    folder = place
    if is_finished(place):
        remove_leftovers(place, format_files)
        if not overwrite:
            raise OutputError(f"{output} already holds a finished result; --overwrite replaces it")
        if os.path.ismount(place):
            raise OutputError(
                f"{place} is where a disk is mounted: its result cannot be replaced as a whole; choose a folder in it"
            )
        folder = beside(place, NEXT)
        check_folder(folder, format_files)
    is_new = not folder.exists()
    make_folder(folder)
    try:
        with locked(folder):
            yield folder
    except BaseException:
        with suppress(OSError):  # only an empty folder goes
            if is_new:
                folder.rmdir()
        raise
    if folder != place:
        _replace(place, format_files)


def unfinished(output: Path) -> Path:
    """The folder that a run of this output works in, or was stopped in: the output, or the one beside a result."""
    place = Path(os.path.realpath(output))
    return beside(place, NEXT) if is_finished(place) else place


def beside(place: Path, ending: str) -> Path:
    """The folder beside an output, whose name is the output's with an ending."""
    return place.with_name(f"{place.name}{ending}")


def _finish_replacement(place: Path, format_files: Iterable[str]) -> None:
    """Mend what a run left that was stopped while its result took the place of an earlier one."""
    following, previous = beside(place, NEXT), beside(place, PREVIOUS)
    if following.is_dir() and is_finished(following):
        check_folder(place, format_files)
        remove_leftovers(following, format_files)
        _replace(place, format_files)
    elif previous.is_dir() and not place.exists():
        _rename(previous, place)
    elif previous.is_dir():
        _clear(previous, place, format_files)


def _replace(place: Path, format_files: Iterable[str]) -> None:
    """Put the finished result beside an output in its place; users' own files stay in the output.

    At every moment either result lies whole under its own name or under one beside it.
    """
    previous = beside(place, PREVIOUS)
    if place.exists():
        _clear(previous, place, format_files)
        _rename(place, previous)
    _rename(beside(place, NEXT), place)
    _clear(previous, place, format_files)


def _rename(folder: Path, name: Path) -> None:
    try:
        os.rename(folder, name)
        synchronize(name.parent)
    except OSError as error:
        raise OutputError(f"cannot rename {folder} to {name}: {error.strerror}") from error


def _clear(previous: Path, place: Path, format_files: Iterable[str]) -> None:
    """Remove the files of a result whose place was taken, and move whatever else lies there to the new one.

    Its records go last: they say which files are ours.
    """
    if not previous.is_dir():
        return
    records = (REPORT, JOURNAL, MEASURING, LOCK)
    files = earlier_files(previous, format_files)
    measured = {ANALYSIS} if (place / ANALYSIS).exists() else set()  # the later measurement is kept
    remove_files(previous, files.union(measured).difference(records))
    folders = {(previous / name).parent for name in files}
    for folder in sorted(folders.intersection(previous.rglob("*")), reverse=True):
        with suppress(OSError):  # users' own files lie in it as well
            folder.rmdir()
    kept = _move_into(previous, place, records)
    if kept:
        raise OutputError(
            f"{previous} holds {kept[0]}, which is also in {place}: move it away, then give the command again"
        )
    remove_files(previous, records)
    previous.rmdir()


def _move_into(source: Path, target: Path, records: Iterable[str] = ()) -> list[Path]:
    """Move what lies in a folder into another one, but for these records; returns what has no room there."""
    kept = []
    for path in sorted(source.iterdir()):
        other = target / path.name
        if path.name in records:
            continue
        if not os.path.lexists(other):
            os.rename(path, other)
        elif path.is_dir() and other.is_dir() and not path.is_symlink():
            kept += _move_into(path, other)
            with suppress(OSError):
                path.rmdir()
        else:
            kept.append(path)
    return kept
