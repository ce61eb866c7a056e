"""Other programs, each in a pinned version and in an environment of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

# Calls of pip. gptqmodel asks for a newer torch than the others, and runs with theirs: it is installed without what it
# asks for, which follows.
LIBRARIES = (
    "accelerate transformers threadpoolctl packaging device-smi protobuf pillow requests pypcre tokenicer logbar jinja2"
    " ninja maturin datasets pyarrow dill torchao defuser"
)
PROGRAMS = {
    "llm-compressor": [["llmcompressor==0.14.0.1"]],
    "gptqmodel": [["--no-deps", "gptqmodel==7.7.0"], LIBRARIES.split()],
    "auto-round": [["auto-round==0.16.0"]],
    "hqq": [["hqq==0.2.8.post1"]],
}


class Unavailable(Exception):
    """A program could not be installed or run."""


def installed(steps: Sequence[Sequence[str]], folder: Path) -> Path:
    """The interpreter of an environment with this torch and what calls of pip with these arguments install.

    It is made where it is not there as wanted.
    """
    python, done = folder.absolute() / "bin" / "python", folder / "installed"
    torch_version = f"torch=={torch.__version__.split('+')[0]}"
    wanted = " ".join([torch_version, *(word for step in steps for word in step)])
    if not done.exists() or done.read_text() != wanted:
        command([sys.executable, "-m", "venv", "--clear", str(folder)])
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command([*pip, torch_version])  # first and by itself, so that a local build is not replaced
        for step in steps:
            command([*pip, torch_version, *step])
        done.write_text(wanted)
    return python


def command(words: list[str]) -> None:
    """Run a program; where it fails, the last line that it wrote is the reason."""
    # The variable keeps HQQ's installation from compiling kernels for another device.
    environment = {**os.environ, "DISABLE_CUDA": "1"}
    try:
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Unavailable(str(error)) from error
    if done.returncode:
        raise Unavailable((done.stdout.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
