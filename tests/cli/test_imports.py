"""While a command starts no garbage is collected, and a stop ends it at once; afterwards both are as before."""

import gc
import signal
import subprocess
import sys

import pytest

from dashq_cli.imports import starting

SWALLOWING = """
import os, signal
from dashq_cli.imports import starting
with starting():
    try:
        os.kill(os.getpid(), signal.NAME)
    except BaseException:
        print("an import took it for a package that is missing")
"""


def test_no_garbage_is_collected_while_libraries_are_imported() -> None:
    gc.enable()
    with starting():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_works_again_where_an_import_fails() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ImportError, match="no_such_module"), starting():
        raise ImportError("no_such_module")
    assert gc.isenabled()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_no_import_swallows_an_interruption(name: str) -> None:
    script = SWALLOWING.replace("NAME", name)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (130, "", "")
