"""The output folder: which folders may be written to, which files in them are ours, and how a file gets its name."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dashq.errors import OutputError
from dashq.model.location import Location
from dashq.model.source import WEIGHTS, WEIGHTS_INDEX
from dashq.results.report import REPORT

JOURNAL = "dashq_journal.json"
RECIPE = "recipe.yaml"
CARD = "README.md"
ANALYSIS = "analysis.json"  # measurements before the run; kept by whatever follows
UNFINISHED = ".unfinished"
# Files that any format's results hold. A report or journal without a list of files, as earlier versions wrote them, or
# a broken one, stands for these and for numbered shards.
RESULT_FILES = frozenset(
    {
        REPORT,
        RECIPE,
        WEIGHTS_INDEX,
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        WEIGHTS,
        CARD,
        "LICENSE",
    }
)
FINAL_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FIRST_SHARD = re.compile(r"part-\d{5}\.safetensors")  # its name while the run goes on


def check_apart(output: Path, location: Location) -> None:
    """Refuse an output in which the model's files lie, or that lies in the model's folder; links are followed.

    Raises `OutputError`. A folder beside a GGUF file is no part of the model.
    """
    place, model = Path(os.path.realpath(output)), location.folder.resolve()  # realpath: a link to itself is no error
    files = [location.folder / location.gguf] if location.gguf else [path for path in model.iterdir() if path.is_file()]
    places = {model, *(path.resolve().parent for path in files)}
    inside_model = not location.gguf and model in place.parents
    if inside_model or any(place == other or place in other.parents for other in places):
        raise OutputError(
            f"the output {output.absolute()} would touch the model {location}: choose a folder outside of it"
        )


def check_folder(folder: Path, overwrite: bool, format_files: Iterable[str] = ()) -> None:
    """Refuse a folder that is not new, empty or ours, that must not be replaced, or that cannot be written to.

    Raises `OutputError`, also for users' own files with names that results have. Files that a run left behind when it
    was stopped after its report was written are removed.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the output {folder.absolute()} is a file, not a folder")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if names and not _is_ours(folder):
        raise OutputError(f"the output folder {folder.absolute()} exists and is not the result of an earlier run")
    if REPORT in names and not overwrite:
        if JOURNAL in names:
            leftovers = _listed(folder, JOURNAL, format_files) - _listed(folder, REPORT, format_files)
            remove_files(folder, leftovers | {JOURNAL})
        raise OutputError(f"{folder} already holds a finished result; --overwrite replaces it")
    foreign = (RESULT_FILES | {*format_files}).intersection(names) - earlier_files(folder, format_files)
    if foreign:
        raise OutputError(
            f"no run wrote {', '.join(sorted(foreign))} in the output folder {folder.absolute()}, and a result has a "
            "file of that name: move it away, or choose another output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"cannot write to the output folder {folder.absolute()}: {error.strerror}") from error


def earlier_files(folder: Path, format_files: Iterable[str]) -> set[str]:
    """The names of all files in a folder that earlier runs wrote there, as its report and its journal list them."""
    return _listed(folder, REPORT, format_files) | _listed(folder, JOURNAL, format_files)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of these names, the report first: without it a folder is unfinished. Nothing else is touched."""
    for name in sorted(names, key=lambda name: (name != REPORT, name)):
        for path in (folder / name, folder / f"{name}{UNFINISHED}"):
            if _is_file_of(folder, path):
                path.unlink()


def remove_unfinished(folder: Path, names: Iterable[str]) -> None:
    """Remove what a stopped run had written of files of these names, but not completed."""
    for name in sorted(names):
        path = folder / f"{name}{UNFINISHED}"
        if _is_file_of(folder, path):
            path.unlink()


def write_bytes(path: Path, content: bytes) -> Path:
    """Write a file, all or nothing; returns it."""
    temporary = unfinished(path)
    temporary.write_bytes(content)
    put_in_place(temporary, path)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a file, all or nothing; returns it."""
    return write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a file of JSON, all or nothing; returns it."""
    return write_text(path, json.dumps(content, indent=1))


def unfinished(path: Path) -> Path:
    """The name of a file until it is complete."""
    return path.with_name(f"{path.name}{UNFINISHED}")


def put_in_place(file: Path, path: Path) -> None:
    """Give a complete file its name, so that neither is lost with the power: its content reaches the disk first."""
    _synchronize(file)
    os.replace(file, path)
    _synchronize(path.parent)


def _synchronize(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_ours(folder: Path) -> bool:
    """True where a run left a journal, the beginnings of a first file, or a report or measurement that names dashq."""
    begun = (JOURNAL, f"{JOURNAL}{UNFINISHED}", f"{ANALYSIS}{UNFINISHED}")
    return any((folder / name).is_file() for name in begun) or any(
        _names_dashq(_content(folder / name)) for name in (REPORT, ANALYSIS)
    )


def _names_dashq(content: Mapping[str, Any]) -> bool:
    versions = content.get("versions")
    return isinstance(versions, dict) and "dashq" in versions


def _listed(folder: Path, record: str, format_files: Iterable[str]) -> set[str]:
    """The names of the files that a report or journal lists; where it has no list, all known ones."""
    content = _content(folder / record)
    if not (_names_dashq(content) if record == REPORT else (folder / record).is_file()):
        return set()
    files = content.get("files")
    if isinstance(files, list):
        return {name for name in files if isinstance(name, str)}
    shards = (FINAL_SHARD,) if record == REPORT else (FINAL_SHARD, FIRST_SHARD)
    numbered = {path.name for path in folder.iterdir() if any(shard.fullmatch(path.name) for shard in shards)}
    return {*RESULT_FILES, *format_files, *numbered}


def _content(path: Path) -> dict[str, Any]:
    """The mapping in a file of JSON; empty where it holds anything else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_file_of(folder: Path, path: Path) -> bool:
    """True for a file, or a link, that lies in a folder, whatever its name pretends."""
    return (path.is_file() or path.is_symlink()) and path.parent.resolve().is_relative_to(folder.resolve())
