"""Several processes at a time, for tests: all are forks of one that has imported what takes seconds to import."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from commands import Outcome

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dashq.pipeline", "transformers.models.llama.modeling_llama"])
# How tiny layers are cut as large ones would be: names in the module of strips, and their values.
STRIPS = {"LEAST": 1, "MULTIPLE": 8, "MORE": 100}
RUN = """
import sys
from pathlib import Path
from dashq import load_recipe, run
from dashq.calibration import strips
from dashq.processes.group import joined
from recipes import REGISTRY
from spread import STRIPS
vars(strips).update(STRIPS)
with joined():
    for recipe in sys.argv[1:]:
        run(load_recipe(Path(recipe), REGISTRY))
"""


def run_together(programs: Sequence[Sequence[str]], **environment: str) -> list[Outcome]:
    """Start a process for each of these arguments of Python, with what torchrun would tell it, and wait for all."""
    common = {**os.environ, **_group(len(programs)), **environment}
    with TemporaryDirectory() as folder:
        places = [Path(folder, str(rank)) for rank in range(len(programs))]
        processes = []
        for rank, (program, place) in enumerate(zip(programs, places, strict=True)):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(FORKS.Process(target=_run, args=(program, own, place)))
            processes[-1].start()
        for process in processes:
            process.join(600)
        return [
            Outcome(process.exitcode, place.with_suffix(".1").read_text(), place.with_suffix(".2").read_text())
            for process, place in zip(processes, places, strict=True)
        ]


def run_spread(count: int, recipes: Sequence[Path]) -> list[Outcome]:
    """Run recipes, one after the other, in so many processes; returns what each process has left behind."""
    return run_together([["-c", RUN, *map(str, recipes)]] * count)


def _group(count: int) -> Mapping[str, str]:
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


def _run(program: Sequence[str], environment: Mapping[str, str], place: Path) -> None:
    """One of the processes, whose output and errors go to files."""
    import torch  # which the process that all are forks of has imported

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # the environment is too late for that
    for number in (1, 2):
        os.dup2(os.open(place.with_suffix(f".{number}"), os.O_CREAT | os.O_WRONLY), number)
    kind, code, *sys.argv[1:] = program
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        exec(code, {"__name__": "__main__"})
