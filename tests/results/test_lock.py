"""One run writes into a folder at a time; a dead one holds nobody up."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dashq import OutputError, run
from dashq.results.lock import LOCK, locked
from recipes import build_recipe

HOLD = """
import sys, time
from pathlib import Path
from dashq.results.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_with_the_first_ones_process_and_host(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(OutputError, match=f"another run writes into {tmp_path / 'out'}: {owner}"):
            run(build_recipe(model, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match=f"process {process.pid} on "), locked(tmp_path):
            pass
        process.kill()
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_the_owner_leaves_no_lock(tmp_path: Path) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(OutputError, match=f"cannot write {tmp_path / LOCK}: No space left"), locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_goes_while_it_is_locked_is_no_error_of_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with locked(folder):
        (folder / LOCK).unlink()
        folder.rmdir()
