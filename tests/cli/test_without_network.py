"""No command asks for anything from outside where models, results and texts lie on this machine."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from recipes import small_recipe, write_recipe

# In a process of its own, which serves all tests and is not told to stay offline: each line of its input is a folder,
# and a command there. What a socket is opened for fails, and is told.
COMMANDS = """
import os, shlex, socket, sys

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
    folder, *words = shlex.split(line)
    os.chdir(folder)
    sys.argv = ["dashq", *words]
    try:
        dashq_cli.main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print(f"EXIT {code} {line}", end="", file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[str]"]:
    """The process, whose standard output nobody reads."""
    environment = {**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("cache"))}
    del environment["HF_HUB_OFFLINE"]
    with subprocess.Popen(
        [sys.executable, "-c", COMMANDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        yield process


def execute_all(commands: list[str], folder: Path, online: "subprocess.Popen[str]") -> str:
    """The errors of commands that run one after another in that process."""
    assert online.stdin
    assert online.stderr
    errors = ""
    for command in commands:
        online.stdin.write(f"{shlex.quote(str(folder))} {command}\n")
        online.stdin.flush()
        lines = [""]
        while not lines[-1].startswith("EXIT "):
            lines.append(online.stderr.readline())
            assert lines[-1], "".join(lines)
        errors += "".join(lines)
    return errors


def test_local_work_opens_no_connection(model: Path, tmp_path: Path, online: "subprocess.Popen[str]") -> None:
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
    errors = execute_all(commands, tmp_path, online)
    ends = [line for line in errors.splitlines() if line.startswith("EXIT ")]
    assert [line.split()[1] for line in ends] == ["0", "0", "0", "0", "0", "2", "0", "0"], errors
    assert "NETWORK" not in errors


def test_the_original_of_a_local_result_is_not_looked_up(
    result: Path, tmp_path: Path, online: "subprocess.Popen[str]"
) -> None:
    folder = shutil.copytree(result, tmp_path / "out")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"model": "org/name"}))
    errors = execute_all(["eval out --context 32 --windows 1", "verify out"], tmp_path, online)
    assert "note: org/name, the original, is not on this machine; name it to download it" in errors
    assert errors.count("EXIT 0") == 2, errors
    assert "NETWORK" not in errors


def test_a_model_that_cannot_be_reached_is_one_line(tmp_path: Path, online: "subprocess.Popen[str]") -> None:
    write_recipe(tmp_path / "r.yaml", small_recipe(Path("org/name"), Path("out")))
    errors = execute_all(["plan r.yaml", "eval org/name", "eval org/na:me"], tmp_path, online)
    assert "Traceback" not in errors
    assert errors.count("EXIT 2") == 3
    assert errors.count("nor to be had from the Hugging Face hub: ") == 3
