"""Seconds of the solvers on one layer, by group size and bits, by the size of the layer, and by iterations.

Weights are standard normal, importances log-normal. Each figure is the median of a few runs after one that is not
counted, in which kernels are compiled. The unit of comparison is a plain read and write of the same weight.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dashq import Diagonal, Grid, Grouping, Solver, load_registry

SOLVERS = load_registry().solvers


def main() -> None:
    """Print one line for each measurement."""
    parser = argparse.ArgumentParser(prog="python -m bench solvers", description=__doc__)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--growth", action="store_true", help="also 1 M to 256 M weights, and more iterations")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    weight, h = layer(arguments.rows, arguments.columns)
    print(json.dumps({"threads": torch.get_num_threads(), "shape": list(weight.shape)}), flush=True)
    solvers = [SOLVERS["rtn"](), SOLVERS["irls"](), SOLVERS["irls"].model_validate({"preset": "paper"})]
    solvers.append(SOLVERS["closed_form"]())
    for bits in (2, 3, 4):
        for size in (128, 64, 32):
            for solver in solvers:
                measure(solver, weight, h, size, bits, arguments.repeat)
    if arguments.growth:
        for millions in (1, 4, 16, 64, 256):
            weight, h = layer(millions * 256, 4096)
            for solver in (SOLVERS["irls"](), SOLVERS["closed_form"]()):
                measure(solver, weight, h, 128, 2, 1)
        weight, h = layer(4096, 4096)
        for iterations in (3, 9, 27):
            # Damped, so that no group comes to rest and every iteration is done.
            fields = {"preset": "paper", "iterations": iterations}
            measure(SOLVERS["irls"].model_validate(fields), weight, h, 128, 2, arguments.repeat)


def layer(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight and the importances of its columns."""
    return torch.randn(rows, columns), (1.5 * torch.randn(columns)).exp()


def measure(solver: Solver, weight: Tensor, h: Tensor, size: int, bits: int, repeat: int) -> None:
    """Time one solver on one layer, and a copy of the weight beside it."""
    grouping, grid = Grouping(columns=weight.shape[1], size=size), Grid(bits=bits, dtype=torch.float16)
    target = torch.empty_like(weight)
    seconds = median(lambda: solver.solve(weight, Diagonal(h), grouping, grid), repeat)
    copying = median(lambda: target.copy_(weight), repeat)
    fields = {key: value for key, value in solver.model_dump().items() if value}
    row = {
        "solver": fields,
        "weights": weight.numel(),
        "group": size,
        "bits": bits,
        "seconds": round(seconds, 4),
        "nanoseconds_per_weight": round(1e9 * seconds / weight.numel(), 2),
        "copies": round(seconds / copying, 1),
    }
    print(json.dumps(row), flush=True)


def median(work: Callable[[], object], repeat: int) -> float:
    """Seconds of the work, without its first run."""
    work()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
