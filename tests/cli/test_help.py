"""The command line explains itself, and does not wait for what it does not need."""

import os
import subprocess
import sys

import pytest
import torch

from commands import call
from recipes import REGISTRY


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["run", "plan", "eval", "plugins"]),
        (["run"], ["RECIPE", "--set", "--overwrite", "--quiet", "--log-json"]),
        (["plan"], ["RECIPE", "--set", "without reading a weight"]),
        (["eval"], ["MODEL", "--text", "--tasks", "--include-path", "--context", "--json", "side by side"]),
        (["plugins"], ["list", "check", "new"]),
        (["init"], ["1 to 8", "Embeddings and head are not counted"]),
        (["verify"], [name for programs in REGISTRY.programs.values() for name in programs]),
    ],
)
def test_help_names_commands_and_options(arguments: list[str], words: list[str]) -> None:
    outcome = call(*arguments, "--help")
    assert outcome.code == 0
    text = " ".join(outcome.output.replace("│", " ").split())
    assert [word for word in words if word not in text] == []


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, dashq_cli; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
    assert torch.__name__ in sys.modules  # the names are right
