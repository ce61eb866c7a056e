"""The processes of a command: `--processes` starts them on this machine, and torchrun on many."""

import os
import sys
from collections.abc import Generator
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
    started = "WORLD_SIZE" in os.environ
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
