"""`dashq run --processes N` starts its processes itself; one that is killed ends all, and the same command goes on."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dashq import load_recipe, run
from dashq.results.folder import JOURNAL
from interruptions import weights
from recipes import REGISTRY, small_recipe, small_scheme, write_recipe

SCHEME = small_scheme(estimator={"name": "hybrid", "chunk": 16}, solver="feedback")


def written(model: Path, path: Path) -> Path:
    """A recipe whose result lies beside it."""
    text = {"dataset": "pydoc", "samples": 8, "sequence_length": 32}
    output = path.with_suffix("")
    return write_recipe(path, small_recipe(model, output, device="cpu", calibration=text, scheme=SCHEME))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Path:
    return written(model, tmp_path / "out.yaml")


def launched(recipe: Path, *options: str) -> "subprocess.Popen[str]":
    program = [sys.executable, "-m", "dashq", "run", str(recipe), "--processes", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def number(process: psutil.Process) -> str | None:
    try:
        return str(process.environ()["RANK"])
    except (psutil.Error, KeyError):
        return None


def test_a_process_that_is_killed_ends_all_and_the_same_command_goes_on(
    recipe: Path, model: Path, tmp_path: Path
) -> None:
    command = launched(recipe)
    while not (tmp_path / "out" / JOURNAL).exists():
        assert command.poll() is None, command.communicate()
        time.sleep(0.02)
    second = next(child for child in psutil.Process(command.pid).children() if number(child) == "1")
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output, errors = command.communicate(timeout=120)
    assert command.returncode == 2, (output, errors)
    assert time.monotonic() - killed < 60
    hint = ", as the system does where memory runs out: the same command goes on"
    assert f"dashq: process 1 of 2 was ended by SIGKILL{hint}\n" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "out" / JOURNAL).exists()

    command = launched(recipe, "--log-json")
    output, errors = command.communicate(timeout=600)
    assert (command.returncode, errors) == (0, "")
    assert output.count('"RunDone"') == 1
    assert output.count('"BlockDone"') == 3  # only the first process speaks, and it counts all
    run(load_recipe(written(model, tmp_path / "one.yaml"), REGISTRY))
    assert weights(tmp_path / "out") == weights(tmp_path / "one")


def test_a_mistake_is_said_once_and_is_the_exit_code(recipe: Path) -> None:
    command = launched(recipe, "--set", "scheme.bits=9")
    output, errors = command.communicate(timeout=600)
    assert command.returncode == 2
    assert output == ""
    assert errors.count("\n") == 1
    assert "scheme.bits" in errors


def test_agents_on_two_machines_share_a_run(recipe: Path, model: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    program = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    agents = [
        subprocess.Popen(
            [*program, "-m", "dashq", "run", str(recipe), "--quiet"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    run(load_recipe(written(model, tmp_path / "one.yaml"), REGISTRY))
    assert weights(tmp_path / "out") == weights(tmp_path / "one")
