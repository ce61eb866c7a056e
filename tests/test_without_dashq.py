"""A result that is opened in transformers without dashq is refused there, and never made up at random."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from format_results import FormatResults

# In a process of its own, which serves all tests: for every folder and class it prints a line.
OPEN = """
import sys
import transformers

for line in sys.stdin:
    folder, name = line.split()
    try:
        getattr(transformers, name).from_pretrained(folder, device_map="cpu")
        print(name, "opened", flush=True)
    except ValueError as error:
        print(name, error, flush=True)
    assert not any(module.startswith("dashq") for module in sys.modules)
"""


@pytest.fixture(scope="module")
def alone() -> Iterator["subprocess.Popen[str]"]:
    """transformers without dashq."""
    command = [sys.executable, "-c", OPEN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
    assert process.returncode == 0


def opened(alone: "subprocess.Popen[str]", folder: Path, name: str) -> str:
    """The line of transformers alone where a class opens a folder."""
    assert alone.stdin
    assert alone.stdout
    alone.stdin.write(f"{folder} {name}\n")
    alone.stdin.flush()
    return alone.stdout.readline().rstrip("\n")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("dashq", "this model is packed by dashq, `import dashq` before you open it"),
        ("mlx", "this model is packed in the format mlx, for programs that its README.md names"),
        ("dashq-packed-linear", "this model is packed in the format dashq-packed-linear, for programs that its"),
    ],
)
def test_transformers_alone_refuses_what_it_does_not_read(
    label: str, message: str, results: FormatResults, alone: "subprocess.Popen[str]"
) -> None:
    for name in ("AutoModel", "AutoModelForCausalLM"):
        assert message in opened(alone, results[label], name)


def test_transformers_alone_opens_the_formats_that_are_its_own(
    results: FormatResults, alone: "subprocess.Popen[str]"
) -> None:
    assert opened(alone, results["metal"], "AutoModelForCausalLM") == "AutoModelForCausalLM opened"
