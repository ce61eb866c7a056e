"""No command asks for anything from outside where models, results and texts lie on this machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipes import small_recipe, write_recipe

# Each line of the input is a command; what a socket is opened for fails, and is told.
COMMANDS = """
import shlex, socket, sys

def forbid(name):
    def fail(*arguments, **options):
        print(f"NETWORK {name}{arguments}", file=sys.stderr)
        raise OSError("no network here")
    return fail

socket.socket.connect = forbid("connect")
socket.socket.connect_ex = forbid("connect_ex")
socket.getaddrinfo = forbid("getaddrinfo")
socket.create_connection = forbid("create_connection")

import dashq_cli

for line in sys.stdin:
    sys.argv = ["dashq", *shlex.split(line)]
    try:
        dashq_cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print(f"EXIT {code} {line}", file=sys.stderr)
"""


def execute_all(commands: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The errors of commands that run one after another in a process that is not told to stay offline."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    process = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input="\n".join(commands),
        capture_output=True,
        text=True,
        cwd=folder,
        check=True,
    )
    return process.stderr


def test_local_work_opens_no_connection(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path / "r.yaml", small_recipe(model, Path("out")))
    measured = "--context 32 --windows 1"
    commands = [
        "plan r.yaml",
        "run r.yaml -q",
        "analyze r.yaml --set output=analysis --kl",
        f"eval out {measured} --prompt while",
        "verify out",
        "convert out --to '{name: dashq, dtype: bfloat16}' --output there",
        "formats",
        "plugins list",
    ]
    errors = execute_all(commands, tmp_path, monkeypatch)
    ends = [line for line in errors.splitlines() if line.startswith("EXIT ")]
    assert [line.split()[1] for line in ends] == ["0", "0", "0", "0", "0", "2", "0", "0"], errors
    assert "NETWORK" not in errors


def test_the_original_of_a_local_result_is_not_looked_up(
    result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(result, tmp_path / "out")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"model": "org/name"}))
    errors = execute_all(["eval out --context 32 --windows 1", "verify out"], tmp_path, monkeypatch)
    assert "note: org/name, the original, is not on this machine; name it to download it" in errors
    assert errors.count("EXIT 0") == 2, errors
    assert "NETWORK" not in errors


def test_a_model_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path / "r.yaml", small_recipe(Path("org/name"), Path("out")))
    errors = execute_all(["plan r.yaml", "eval org/name", "eval org/na:me"], tmp_path, monkeypatch)
    assert "Traceback" not in errors
    assert errors.count("EXIT 2") == 3
    assert errors.count("nor to be had from the Hugging Face hub: ") == 3
