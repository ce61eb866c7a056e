"""The output folder: which folders may be written to, and which files in them are ours."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dashq.errors import OutputError
from dashq.results.report import REPORT

JOURNAL = "dashq_journal.json"
RECIPE = "recipe.yaml"
CARD = "README.md"
ANALYSIS = "analysis.json"  # measurements before the run; kept by whatever follows
INDEX = "model.safetensors.index.json"
# Patterns of all that an earlier result leaves behind in any format, the report first: without it a folder is
# unfinished.
RESULT_FILES = (
    REPORT,
    RECIPE,
    INDEX,
    "config.json",
    "generation_config.json",
    "*processor_config.json",
    "chat_template*.jinja",
    "tokenizer*",
    "part-*.safetensors",
    "model*.safetensors",
    "*.unfinished",
    CARD,
    "LICENSE*",
)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is not new, empty or ours, that must not be replaced, or that cannot be written to."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the output {folder.absolute()} is a file, not a folder")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if names and not any(name.startswith((JOURNAL, REPORT, ANALYSIS)) for name in names):
        raise OutputError(f"the output folder {folder.absolute()} exists and is not the result of an earlier run")
    if REPORT in names and not overwrite:
        raise OutputError(f"{folder} already holds a finished result; --overwrite replaces it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(f"cannot write to the output folder {folder.absolute()}: {error.strerror}") from error


def remove_result(folder: Path, format_files: Iterable[str]) -> None:
    """Remove an earlier result, finished or not, with the files of its format; nothing else is touched."""
    for pattern in (*RESULT_FILES, *format_files):
        for path in folder.glob(pattern):
            path.unlink()


def write_text(path: Path, text: str) -> Path:
    """Write a file, all or nothing; returns it."""
    temporary = path.with_name(f"{path.name}.unfinished")
    temporary.write_text(text)
    os.replace(temporary, path)
    return path


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a file of JSON, all or nothing; returns it."""
    return write_text(path, json.dumps(content, indent=1))
