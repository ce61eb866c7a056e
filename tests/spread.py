"""Runs in several processes, for tests: these share the seconds that it takes to import torch."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from commands import Outcome

# How tiny layers are cut as large ones would be: names in the module of strips, and their values.
STRIPS = {"LEAST": 1, "MULTIPLE": 8, "MORE": 100}


def together(count: int) -> Mapping[str, str]:
    """Environment variables that torchrun would set for so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }


def alone(rank: int) -> Mapping[str, str]:
    """Environment variables that torchrun would set for one of them."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def start(programs: Sequence[Sequence[str]], **environment: str) -> list["subprocess.Popen[str]"]:
    """A process for each of these arguments of Python, with what torchrun would tell it."""
    common = {**os.environ, **together(len(programs))}
    return [
        subprocess.Popen(
            [sys.executable, *program],
            env={**common, **alone(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, program in enumerate(programs)
    ]


def ends(processes: Sequence["subprocess.Popen[str]"]) -> list[Outcome]:
    """Exit codes and words of processes, when all have ended."""
    outcomes = []
    for process in processes:
        output, errors = process.communicate(timeout=600)
        outcomes.append(Outcome(process.returncode, output, errors))
    return outcomes


def run_spread(count: int, recipes: Sequence[Path]) -> list[Outcome]:
    """Run recipes, one after the other, in so many processes; returns what each process has left behind."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, __file__, str(count), folder, *map(str, recipes)]
        environment = {**os.environ, **together(count)}
        whole = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        assert whole.returncode == 0, whole.stderr
        return [
            Outcome(code, *(Path(folder, f"{rank}.{number}").read_text() for number in (1, 2)))
            for rank, code in enumerate(json.loads(whole.stdout))
        ]


def _run(rank: int, folder: str, recipes: Sequence[str]) -> None:
    """One of the processes, whose output and errors go to files."""
    os.environ.update(alone(rank))
    for number in (1, 2):
        os.dup2(os.open(Path(folder, f"{rank}.{number}"), os.O_CREAT | os.O_WRONLY), number)
    with joined():
        for recipe in recipes:
            run(load_recipe(Path(recipe), REGISTRY))


if __name__ == "__main__":
    from dashq import load_recipe, run
    from dashq.calibration import strips
    from dashq.processes.group import joined
    from recipes import REGISTRY

    for name, value in STRIPS.items():
        setattr(strips, name, value)
    _, count, folder, *recipes = sys.argv
    forking = multiprocessing.get_context("fork")
    processes = [forking.Process(target=_run, args=(rank, folder, recipes)) for rank in range(int(count))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    print(json.dumps([process.exitcode for process in processes]))
