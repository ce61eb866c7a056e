"""The lock of a folder: one run at a time writes into it."""

import errno
import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from dashq.errors import OutputError

LOCK = "dashq.lock"
UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)  # by some network file systems


class FolderInUseError(OutputError):
    """Another process writes into the folder."""


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold a folder's lock for the duration of the `with` statement; a `FolderInUseError` where another one does.

    The kernel lets go of the lock of a process that dies, so that none is ever stale. The file says who holds it.
    """
    path = folder / LOCK
    with _refusing(path):
        descriptor = _locked_file(path)
    with os.fdopen(descriptor):  # the lock goes with the descriptor, also where the disk has no room for the owner
        try:
            with _refusing(path):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            with suppress(OSError):  # the folder may be gone
                path.unlink()


@contextmanager
def _refusing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _locked_file(path: Path) -> int:
    """The descriptor of the lock's file, opened and locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise FolderInUseError(f"another run writes into {path.parent}: {owner}") from error
        except OSError as error:
            # Without locks, the run has to trust that no other one writes here.
            if error.errno not in UNSUPPORTED:
                os.close(descriptor)
                raise
            return descriptor
        # Whoever held it may have removed the file in between: then the lock is that of a file without a name.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
        os.close(descriptor)
