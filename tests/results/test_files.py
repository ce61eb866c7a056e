"""Files are written all or nothing, and removed by exact names."""

import errno
import os
from pathlib import Path

import pytest

from dashq import OutputError
from dashq.model.mappings import read_mapping
from dashq.results.files import read_sealed, remove_files, write_json, write_sealed, write_text


def put(folder: Path, *names: str) -> dict[str, bytes]:
    """Write files of these names; returns the contents."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"all my work on {name}")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_no_list_reaches_out_of_its_folder(tmp_path: Path) -> None:
    work = put(tmp_path / "elsewhere", "thesis.txt")
    out = tmp_path / "out"
    put(out, "ours.txt")
    (out / "linked").symlink_to(tmp_path / "elsewhere")
    (out / "link.txt").symlink_to(tmp_path / "elsewhere" / "thesis.txt")
    (out / "folder").mkdir()
    outside = ["../elsewhere/thesis.txt", str(tmp_path / "elsewhere" / "thesis.txt"), "linked/thesis.txt"]
    remove_files(out, [*outside, "link.txt", "ours.txt", "folder", "linked/..", ".", "", "absent", "nul\0"])
    assert {path.name for path in out.iterdir()} == {"linked", "folder"}
    assert contents(tmp_path / "elsewhere") == work


def test_a_file_reaches_the_disk_before_its_name_and_its_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int | str] = []
    replace, synchronize = os.replace, os.fsync

    def note_synchronized(file: int) -> None:
        steps.append(os.fstat(file).st_ino)
        synchronize(file)

    def note_named(old: Path, new: Path) -> None:
        steps.append("name")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_synchronized)
    monkeypatch.setattr(os, "replace", note_named)
    path = write_text(tmp_path / "file", "content")
    assert steps == [path.stat().st_ino, "name", tmp_path.stat().st_ino]
    assert path.read_text() == "content"


def test_what_cannot_be_written_is_named_and_what_was_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_text(tmp_path / "file", "content")
    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OutputError, match=f"^cannot write {path}: No space left on device$"):
        write_text(path, "other")
    monkeypatch.undo()
    assert path.read_text() == "content"
    with pytest.raises(OutputError, match=r"^cannot write .*/absent/file: No such file or directory$"):
        write_text(tmp_path / "absent" / "file", "content")


def test_json_can_be_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_mapping(write_json(tmp_path / "file", {"a": [1, None]})) == {"a": [1, None]}


CONTENT = {"layers": [{"bits": 3, "error": 0.125}], "what": None}


def test_a_sealed_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_sealed(write_sealed(tmp_path / "file", CONTENT)) == CONTENT


@pytest.mark.parametrize("change", [{"layers": []}, {"what": 1}, {"new": 1}, {"seal": "0"}, {"seal": None}])
def test_a_sealed_file_that_has_changed_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    written = read_mapping(write_sealed(tmp_path / "file", CONTENT))
    write_json(tmp_path / "file", written | change)
    with pytest.raises(ValueError, match="its content is not what was written"):
        read_sealed(tmp_path / "file")


def test_names_that_are_no_unicode_are_written_in_ascii(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    assert write_text(tmp_path / "file", name).read_bytes() == rb"caf\udce9"
