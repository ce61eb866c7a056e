"""The processes of a command: `--processes` starts them on this machine, and torchrun on many."""

import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from dashq_cli.imports import starting

Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        metavar="N",
        help="Share the work among N processes on this machine; the result is the same.",
    ),
]


@contextmanager
def among(processes: int) -> Generator[bool]:
    """Take part in the command's processes for the duration of the `with` statement; True in the one that speaks.

    Where they are yet to be started, they are, and the command ends when they do.
    """
    started = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    if processes == 1 and not started:
        yield True
        return
    with starting():
        from dashq.processes.group import joined
        from dashq.processes.launch import launch
    if not started:
        raise SystemExit(launch(sys.argv[1:], processes))
    with joined() as own:
        yield own.is_first


@contextmanager
def beside(command: Sequence[str], processes: int) -> Generator[None]:
    """Further processes that do a silent command for the duration of the `with` statement, with this one so many.

    They share the machine's threads. This one waits for them in the end, or ends them where it fails.
    """
    if processes == 1:
        yield
        return
    import torch

    from dashq.processes.launch import THREADS

    threads = max(1, torch.get_num_threads() // processes)
    torch.set_num_threads(threads)
    environment = {**os.environ, THREADS: str(threads)}
    program, quiet = [sys.executable, "-m", "dashq", *command], subprocess.DEVNULL
    others = [subprocess.Popen(program, env=environment, stdout=quiet, stderr=quiet) for _ in range(processes - 1)]
    try:
        yield
    except BaseException:
        for other in others:
            other.terminate()
        raise
    finally:
        for other in others:
            other.wait()
