"""Runs in several processes, for tests: the recipes of one launch share the seconds that it takes to import torch."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from commands import Outcome

# How tiny layers are cut as large ones would be: names in the module of strips, and their values.
STRIPS = {"LEAST": 1, "MULTIPLE": 8, "MORE": 100}


def start(programs: Sequence[Sequence[str]], **environment: str) -> list["subprocess.Popen[str]"]:
    """A process for each of these arguments of Python, with what torchrun would tell it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(programs)),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *program],
            env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
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
    return ends(start([[__file__, *map(str, recipes)]] * count))


if __name__ == "__main__":
    from dashq import load_recipe, run
    from dashq.calibration import strips
    from dashq.processes.group import joined
    from recipes import REGISTRY

    for name, value in STRIPS.items():
        setattr(strips, name, value)
    with joined():
        for path in sys.argv[1:]:
            run(load_recipe(Path(path), REGISTRY))
