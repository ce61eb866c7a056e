"""Seconds of the solvers on one layer, by group size, bits and kind of zero, by its size, and by iterations.

Weights are standard normal, importances log-normal. `seconds` is the median and `least` the least of a few runs after
one that is not counted, in which kernels are compiled or loaded: `first`. The unit of comparison is a plain read and
write of the same weight. `memory` is how far the resident set of the process rose (on a graphics processor: what was
allocated there), result included, in parts of the weight's size.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench._record import result_line
from dashq import Diagonal, Grid, Grouping, Solver, load_registry
from dashq.data import Zero
from dashq.device import wait_for
from dashq.solving import compiled

SOLVERS = load_registry().solvers
ZEROS: tuple[Zero, ...] = ("integer", "symmetric")
COMPILE_FROM = compiled.COMPILE_FROM
CLEAR_PEAK = Path("/proc/self/clear_refs")


def main() -> None:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench solvers", description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--growth", action="store_true", help="only 1 M to 256 M weights, and more iterations")
    parser.add_argument("--small", action="store_true", help="only small layers, as written and compiled")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_device(arguments.device)
    name = torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else "cpu"
    about = {"device": name, "threads": torch.get_num_threads(), "shape": [arguments.rows, arguments.columns]}
    print(result_line(about, str(arguments.device)), flush=True)
    if arguments.small:
        small(arguments.repeat)
    elif arguments.growth:
        growth(arguments.repeat)
    else:
        grids(*layer(arguments.rows, arguments.columns), arguments.repeat)


def grids(weight: Tensor, h: Tensor, repeat: int) -> None:
    """Every solver at every group size and number of bits."""
    solvers = [SOLVERS["rtn"](), SOLVERS["irls"](), SOLVERS["irls"].model_validate({"preset": "paper"})]
    solvers.append(SOLVERS["closed_form"]())
    for bits in (2, 3, 4):
        for size in (128, 64, 32):
            for solver in solvers:
                measure(solver, weight, h, size, Grid(bits=bits, dtype=torch.float16), repeat)
    for zero in ZEROS:
        for solver in solvers[1::2]:
            measure(solver, weight, h, 128, Grid(bits=2, dtype=torch.float16, zero=zero), repeat)


def growth(repeat: int) -> None:
    """Layers of 1 M to 256 M weights, and 3 to 27 iterations."""
    grid = Grid(bits=2, dtype=torch.float16)
    for millions in (1, 4, 16, 64, 256):
        weight, h = layer(millions * 256, 4096)
        for solver in (SOLVERS["irls"](), SOLVERS["closed_form"]()):
            measure(solver, weight, h, 128, grid, repeat)
    weight, h = layer(4096, 4096)
    for iterations in (3, 9, 27):
        # Damped, so that no group comes to rest and every iteration is done.
        fields = {"preset": "paper", "iterations": iterations}
        measure(SOLVERS["irls"].model_validate(fields), weight, h, 128, grid, repeat)


def small(repeat: int) -> None:
    """Layers of 4 K to 1 M weights, first all as written and then all compiled."""
    for compiled.COMPILE_FROM in (1 << 62, 0):
        for logarithm in range(12, 21):
            weight, h = layer(1 << (logarithm - 9), 512)
            for solver in (SOLVERS["irls"](), SOLVERS["closed_form"]()):
                measure(solver, weight, h, 128, Grid(bits=2, dtype=torch.float16), repeat)


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight and the importances of its columns."""
    return torch.randn(rows, columns), (1.5 * torch.randn(columns)).exp()


def measure(solver: Solver, weight: Tensor, h: Tensor, size: int, grid: Grid, repeat: int) -> None:
    """Time one solver on one layer, and a copy of the weight beside it."""
    grouping, target = Grouping(columns=weight.shape[1], size=size), torch.empty_like(weight)
    copying = statistics.median(seconds(lambda: target.copy_(weight), repeat)[1:])
    before = memory_in_use(weight.device)
    first, *others = seconds(lambda: solver.solve(weight, Diagonal(h), grouping, grid), repeat)
    memory = most_memory(weight.device) - before
    fields = {key: value for key, value in solver.model_dump().items() if value}
    median = statistics.median(others)
    row = {
        "solver": fields,
        "weights": weight.numel(),
        "group": size,
        "bits": grid.bits,
        **({} if grid.zero == "real" else {"zero": grid.zero}),
        **({} if compiled.COMPILE_FROM == COMPILE_FROM else {"compiled": compiled.COMPILE_FROM == 0}),
        "seconds": round(median, 5),
        "least": round(min(others), 5),
        "first": round(first, 2),
        "nanoseconds_per_weight": round(1e9 * median / weight.numel(), 2),
        "copies": round(median / copying, 1),
        "memory": round(memory / (4 * weight.numel()), 2),
    }
    print(result_line(row, str(weight.device)), flush=True)


def memory_in_use(device: torch.device) -> int:
    """Bytes of this process in memory now; what is at most in use is counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    CLEAR_PEAK.write_text("5")
    return resident("VmRSS")


def most_memory(device: torch.device) -> int:
    """The most bytes of this process in memory since `memory_in_use`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def resident(field: str) -> int:
    """What the operating system says of this process's memory, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def seconds(work: Callable[[], object], repeat: int) -> list[float]:
    """Seconds of the first run of the work, and of as many more."""
    taken = []
    for _ in range(repeat + 1):
        wait_for(torch.get_default_device())
        start = time.perf_counter()
        work()
        wait_for(torch.get_default_device())
        taken.append(time.perf_counter() - start)
    return taken
