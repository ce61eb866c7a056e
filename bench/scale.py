"""Seconds and bytes sent of a run in one process and in several, in turn; and a model of what large models would send.

Each process has one thread. The model counts from shapes alone, for 128 samples of 2,048 tokens,
or one for each process, and full curvatures.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import dashq
from bench._record import result_line
from bench.robustness import METHODS, RECIPE, settings_of
from dashq.calibration.strips import solvers_of, strips_of
from dashq.processes.group import here, joined
from dashq.results.events import BlockDone, Event
from dashq.results.report import read_report

SAMPLES, TOKENS = 128, 128 * 2048
SHARES, STRIPS = 8, 8  # of samples unless there are more processes, and of a large layer
PRODUCTS = 200e12  # operations a second of one process: half of what a graphics processor promises in 16 bits
IN_A_MACHINE = 8  # processes, each with a graphics processor
LINKS = ("sending inside a machine", 200e9), ("sending between machines", 20e9)  # bytes a second of one process


@dataclass(frozen=True)
class Shape:
    """A decoder: width, columns of the last layer of a feed-forward part, of keys and values, blocks and experts."""

    width: int
    inner: int
    keys: int
    blocks: int
    experts: int = 0
    chosen: int = 1

    def layers(self) -> list[tuple[str, int, int]]:
        """The layers of a block: the inputs that they are given, rows and columns."""
        attention = [("x", self.width, self.width), ("x", self.keys, self.width), ("x", self.keys, self.width)]
        attention.append(("o", self.width, self.width))
        experts = range(max(1, self.experts))
        gates = [(f"g{expert}{part}", self.inner, self.width) for expert in experts for part in "ab"]
        if not self.experts:  # of experts each layer has a fold of its own
            gates = [("g", self.inner, self.width)] * 2
        return [*attention, *gates, *((f"d{expert}", self.width, self.inner) for expert in experts)]


SHAPES = {
    "7B": Shape(4096, 11008, 4096, 32),
    "70B": Shape(8192, 28672, 1024, 80),
    "405B": Shape(16384, 53248, 1024, 126),
    "30B, 128 experts": Shape(2048, 768, 512, 48, experts=128, chosen=8),
    "671B, 256 experts": Shape(7168, 2048, 1536, 58, experts=256, chosen=8),
}


def main() -> None:
    """Print one line for each run, or a row of a table for each model and number of processes."""
    parser = argparse.ArgumentParser(prog="python -m bench scale", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["closed_form", "hybrid"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="in each sample")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--note", default="", help="what else is to be known, as other work on the machine")
    parser.add_argument("--table", action="store_true", help="print the model of what large models would send")
    parser.add_argument("--balance", action="store_true", help="print how many times as fast processes would solve")
    parser.add_argument("--worker", metavar="RECIPE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(Path(arguments.worker))
    elif arguments.table:
        print_table()
    elif arguments.balance:
        print_balance()
    else:
        for _ in range(arguments.repeat):
            for method in arguments.methods:
                for processes in arguments.processes:
                    print(result_line(measure(method, processes, arguments)), flush=True)


def measure(method: str, processes: int, arguments: argparse.Namespace) -> dict[str, object]:
    """The figures of one run. Bytes are those that the first process sent and received."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*settings_of(method, arguments, f"{folder}/out", "float32"), "device=cpu"]
        recipe = dashq.load_recipe(Path(RECIPE), dashq.load_registry(), settings)
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe.model_dump(mode="json")))  # YAML too
        start = time.perf_counter()
        workers = in_processes(path, processes)
        whole = time.perf_counter() - start
        report = read_report(Path(folder) / "out")
    return {
        "recipe": method,
        "processes": processes,
        "text": f"{Path(arguments.calibration).name}, {arguments.samples} x {arguments.tokens}",
        "seconds": report.seconds,
        "whole_seconds": round(whole, 1),
        "cpu_seconds": [worker["cpu_seconds"] for worker in workers],
        "bytes_per_block": median(workers[0]["bytes"]),
        "divergence": report.judgement.divergence if report.judgement else None,
    } | ({"note": arguments.note} if arguments.note else {})


def in_processes(recipe: Path, count: int) -> list[dict[str, Any]]:
    """Run a recipe in so many processes of one thread; returns what each says of itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "bench", "scale", "--worker", str(recipe)]
    workers = [
        subprocess.Popen(program, env={**os.environ, **told, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(count)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        sys.exit("a process has failed")
    return [json.loads(output) for output in outputs]


def work(path: Path) -> None:
    """One of the processes: run the recipe, and print CPU seconds and the bytes sent and received for each block.

    Only the first process hears of blocks.
    """
    recipe, sums, start = dashq.load_recipe(path, dashq.load_registry()), [0], time.process_time()

    def listen(event: Event) -> None:
        if isinstance(event, BlockDone):
            sums.append(here().traffic[0])

    with joined():
        dashq.run(recipe, listen)
    sent = [after - before for before, after in pairwise(sums)]
    print(json.dumps({"cpu_seconds": round(time.process_time() - start, 1), "bytes": sent}))


def computing(shape: Shape, processes: int) -> float:
    """Seconds of one process for a block: two passes of its samples, the original's too, and their second moments."""
    operations, tokens = 0.0, TOKENS * max(1, processes // SAMPLES)
    for inputs, rows, columns in shape.layers():
        share = shape.chosen / shape.experts if shape.experts and inputs[0] in "gd" else 1.0
        operations += share * 2 * 2 * tokens * rows * columns
    for inputs, columns in folds_of(shape):
        share = shape.chosen / shape.experts if shape.experts and inputs[0] in "gd" else 1.0
        operations += share * tokens * columns**2  # symmetric
    return operations / (processes * PRODUCTS)


def passed_on(shape: Shape, processes: int) -> tuple[int, int]:
    """Bytes of full curvatures that the last process takes in and hands out for a block, and those sent before.

    The others pass on as much, or less; the last one has nothing before the first state has gone through all.
    """
    if processes == 1:
        return 0, 0
    sizes = {inputs: 4 * columns**2 for inputs, columns in folds_of(shape)}
    solving = min(processes, STRIPS)
    layers: dict[str, int] = {}
    for inputs, _, _ in shape.layers():
        layers[inputs] = layers.get(inputs, 0) + 1
    # Experts are whole layers of one process each; a dense layer is spread over as many as it has strips.
    handed = sum(size * (layers[inputs] if shape.experts else solving) for inputs, size in sizes.items())
    return sum(sizes.values()) + handed, (processes - 2) * max(sizes.values())


def print_balance() -> None:
    """Print how many times as fast processes solve a block's layers, in turn or all at once, as a table in Markdown.

    By what solvers claim of their time, and by who solves which strips; sending and what each process repeats for the
    same columns are not counted.
    """
    counts = (2, 4, 8)
    print(row(["model", "solver", "layers", *(f"{count} processes" for count in counts)]))
    print(row(["---", "---", "---", *["---:"] * len(counts)]))
    registry = dashq.load_registry()
    grid = registry.serializers["dashq"]().grid(2)
    for name, shape in {"SmolLM2": Shape(576, 1536, 192, 30), **SHAPES}.items():
        for solver, in_turn in (("closed_form", False), ("feedback", False), ("feedback", True)):
            stages: dict[str, list[Any]] = {}
            for number, (inputs, rows, columns) in enumerate(shape.layers()):
                layer = dashq.Layer(name=f"{number}", rows=rows, columns=columns)
                scheme = SimpleNamespace(solver=registry.solvers[solver]())
                plan = SimpleNamespace(layer=layer, scheme=scheme, size=64, grid=grid)
                stages.setdefault(inputs if in_turn and not shape.experts else "", []).append(plan)
            gains = [f"{gain_of([*stages.values()], count):.1f}" for count in counts]
            print(row([name, f"`{solver}`", "in turn" if in_turn else "at once", *gains]))


def gain_of(stages: Sequence[Sequence[Any]], processes: int) -> float:
    """The work of all stages beside that of the process that has most, stage by stage."""
    whole = longest = 0.0
    for plans in stages:
        loads, solvers = [0.0] * processes, solvers_of(plans, processes)
        for plan in plans:
            layer, strips = plan.layer, strips_of(plan)
            for strip, solver in zip(strips, solvers[layer.name], strict=True):
                part = replace(layer, rows=strip.stop - strip.start)
                loads[solver] += part.weights * plan.scheme.solver.nanoseconds(part, plan.size, plan.grid)
        whole, longest = whole + sum(loads), longest + max(loads)
    return whole / longest


def folds_of(shape: Shape) -> set[tuple[str, int]]:
    """The inputs that are folded in a block, each with its columns."""
    return {(inputs, columns) for inputs, _, columns in shape.layers()}


def print_table() -> None:
    """Print the model as a table in Markdown."""
    heads = ["model", "processes", "computing, s", "sent, GB", "sending, s", "states, GB"]
    print(row([*heads, "longest"]))
    print(row(["---", *["---:"] * (len(heads) - 1), "---"]))
    for name, shape in SHAPES.items():
        for processes in (1, 8, 64, 512):
            sent, before = passed_on(shape, processes)
            link, speed = LINKS[processes > IN_A_MACHINE]
            seconds = {"computing": computing(shape, processes), link: (sent + before) / speed}
            kept = 1 + max(1, SHARES // processes) if processes > 1 else 2
            states = kept * sum(4 * columns**2 for _, columns in folds_of(shape))
            figures = [f"{seconds['computing']:.2f}", f"{sent / 1e9:.1f}", f"{seconds[link]:.2f}"]
            longest = max(seconds, key=seconds.__getitem__)
            print(row([name, str(processes), *figures, f"{states / 1e9:.1f}", longest]))


def row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
