"""A result that is opened in transformers without dashq is refused there, and never made up at random."""

import subprocess
import sys
from pathlib import Path

import pytest

from format_results import FormatResults

OPEN = """
import sys
import transformers

folder, *classes = sys.argv[1:]
for name in classes:
    try:
        getattr(transformers, name).from_pretrained(folder, device_map="cpu")
        print(name, "opened")
    except ValueError as error:
        print(name, error)
assert not any(name.startswith("dashq") for name in sys.modules)
"""


def open_without_dashq(folder: Path, *classes: str) -> list[str]:
    """A line of transformers alone for each class that a folder is opened with."""
    process = subprocess.run([sys.executable, "-c", OPEN, folder, *classes], capture_output=True, text=True, check=True)
    return process.stdout.splitlines()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("dashq", "this model is packed by dashq, `import dashq` before you open it"),
        ("mlx", "this model is packed in the format mlx, for programs that its README.md names"),
        ("dashq-packed-linear", "this model is packed in the format dashq-packed-linear, for programs that its"),
    ],
)
def test_transformers_alone_refuses_what_it_does_not_read(label: str, message: str, results: FormatResults) -> None:
    lines = open_without_dashq(results[label], "AutoModel", "AutoModelForCausalLM")
    assert len(lines) == 2
    assert all(message in line for line in lines)


def test_transformers_alone_opens_the_formats_that_are_its_own(results: FormatResults) -> None:
    assert open_without_dashq(results["metal"], "AutoModelForCausalLM") == ["AutoModelForCausalLM opened"]
