"""The output folder: which folders may be written to, and which files in them are ours."""

import errno
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dashq.errors import OutputError
from dashq.model.location import CARD, Location
from dashq.model.mappings import mapping_or_empty
from dashq.model.source import WEIGHTS, WEIGHTS_INDEX
from dashq.results.files import UNFINISHED, remove_files
from dashq.results.lock import LOCK, locked
from dashq.results.report import REPORT

JOURNAL = "dashq_journal.json"
RECIPE = "recipe.yaml"
PAGE = "report.html"
ANALYSIS = "analysis.json"  # measurements before the run; kept by whatever follows
MEASURING = "dashq_measuring.json"  # the journal of an unfinished measurement
TUNING = "dashq_tuning.safetensors"  # the state of an unfinished tuning
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
        PAGE,
        "LICENSE",
    }
)
# Folders beside an output: of the result that is to take its place, and of the one whose place was taken.
NEXT, PREVIOUS = ".dashq-next", ".dashq-previous"
FINAL_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
FIRST_SHARD = re.compile(r"(part|tuned)-\d{5}\.safetensors")  # its name while the run goes on


def check_apart(output: Path, location: Location, name: str = "output") -> None:
    """Refuse an output in which the model's files lie, or that lies in the model's folder; links are followed.

    It may be another folder to write into, by a `name` of its own. Raises `OutputError`, also where no folder can be
    made there. A folder beside a GGUF file is no part of the model.
    """
    _check_reachable(output)
    place, model = Path(os.path.realpath(output)), location.folder.resolve()  # realpath: a link to itself is no error
    files = [location.folder / location.gguf] if location.gguf else [path for path in model.iterdir() if path.is_file()]
    places = {model, *(path.resolve().parent for path in files)}
    inside_model = not location.gguf and model in place.parents
    if inside_model or any(place == other or place in other.parents for other in places):
        raise OutputError(
            f"the {name} {output.absolute()} would touch the model {location}: choose a folder outside of it"
        )


def _check_reachable(output: Path) -> None:
    for index, part in enumerate(output.parts):
        before = Path(*output.parts[:index])
        if part == ".." and not before.is_dir():
            raise OutputError(f"the output {output} leads through {before}, which is no folder: write it without `..`")
    try:
        os.lstat(f"{os.path.realpath(output)}{PREVIOUS}")
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            more = f"a folder beside it needs {len(PREVIOUS)} bytes more"
            raise OutputError(f"the name of the output {output} is too long: {more}") from error


def is_finished(folder: Path) -> bool:
    """True where a folder holds a whole result: its report is the last file that a run writes."""
    return _names_dashq(mapping_or_empty(folder / REPORT))


def check_folder(folder: Path, format_files: Iterable[str] = ()) -> None:
    """Refuse a folder that is not new, empty or ours, that holds users' own files with names that results have.

    Raises `OutputError`.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the output {folder.absolute()} is a file, not a folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not _is_ours(folder):
        raise OutputError(f"the output folder {folder.absolute()} exists and is not the result of an earlier run")
    foreign = (RESULT_FILES | {*format_files}).intersection(names) - earlier_files(folder, format_files)
    foreign |= {name for name in names & {ANALYSIS, JOURNAL, MEASURING, LOCK} if (folder / name).is_dir()}
    if foreign:
        raise OutputError(
            f"no run wrote {', '.join(sorted(foreign))} in the output folder {folder.absolute()}, and a result has a "
            "file of that name: move it away, or choose another output"
        )


def make_folder(folder: Path) -> None:
    """Make a folder where it is not there yet; an `OutputError` where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"cannot write to the output folder {folder.absolute()}: {error.strerror}") from error


def earlier_files(folder: Path, format_files: Iterable[str] = ()) -> set[str]:
    """The names of all files in a folder that earlier runs wrote there, as its report and its journals list them."""
    return {name for record in (REPORT, JOURNAL, MEASURING) for name in listed_files(folder, record, format_files)}


def listed_files(folder: Path, record: str, format_files: Iterable[str] = ()) -> set[str]:
    """The names of the files that a report or journal lists; where it has no list, all known ones."""
    content = mapping_or_empty(folder / record)
    if not (_names_dashq(content) if record == REPORT else (folder / record).is_file()):
        return set()
    files = content.get("files")
    if isinstance(files, list):
        return {name for name in files if isinstance(name, str)}
    if record == MEASURING:
        return set()
    shards = (FINAL_SHARD,) if record == REPORT else (FINAL_SHARD, FIRST_SHARD)
    numbered = {path.name for path in folder.iterdir() if any(shard.fullmatch(path.name) for shard in shards)}
    return {*RESULT_FILES, *format_files, *numbered}


def remove_leftovers(folder: Path, format_files: Iterable[str] = ()) -> None:
    """Remove what a run left beside its finished result when it was stopped after its report was written."""
    if any((folder / name).is_file() for name in (JOURNAL, LOCK)):
        with locked(folder):
            leftovers = listed_files(folder, JOURNAL, format_files) - listed_files(folder, REPORT, format_files)
            remove_files(folder, leftovers)
            remove_files(folder, [JOURNAL])


def _is_ours(folder: Path) -> bool:
    """True where a run left a lock, a journal, the beginnings of a first file, or a report that names dashq."""
    journals = (JOURNAL, MEASURING)
    begun = (LOCK, *journals, *(f"{name}{UNFINISHED}" for name in (*journals, ANALYSIS)))
    return any((folder / name).is_file() for name in begun) or any(
        _names_dashq(mapping_or_empty(folder / name)) for name in (REPORT, ANALYSIS)
    )


def _names_dashq(content: Mapping[str, Any]) -> bool:
    versions = content.get("versions")
    return isinstance(versions, dict) and "dashq" in versions
