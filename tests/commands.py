"""The command line for tests: in this process, which is quick, or in one of its own, which is real."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import dashq_cli


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int | str | None
    output: str
    errors: str


def call(*arguments: object, columns: int = 200) -> Outcome:
    """`dashq` with these arguments, in this process, on a terminal so wide."""
    output, errors = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with (
        patch.object(sys, "argv", ["dashq", *map(str, arguments)]),
        patch.dict(os.environ, COLUMNS=str(columns)),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            dashq_cli.main()
        except SystemExit as end:
            code = end.code or 0
    return Outcome(code, output.getvalue(), errors.getvalue())


def execute(*arguments: object, **environment: str) -> Outcome:
    """`dashq` with these arguments, in a process of its own."""
    program = Path(sys.executable).with_name("dashq")
    process = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        check=False,
    )
    return Outcome(process.returncode, process.stdout, process.stderr)
