"""Seconds and errors on one layer of dashq's solvers, of HQQ, and of two programs' GPTQ with the full Hessian.

Drawn with a fixed seed: the weight is normal with standard deviation 0.02, and one column in 64, chosen at random, is
4 times as large. An input is s · (z + u M): z is standard normal in every column, u has columns / 16 standard normal
factors that all columns share through a normal matrix M, which gives each column as much variance as z, and s is
log-normal, exp(N(0, 1)). dashq's solvers see the mean squares h of the columns, GPTQ the whole second moment, HQQ
nothing. Finding these is not timed, nor is packing. `weighted_error` is Σ h (w - ŵ)² / Σ h w², `output_error` is
‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² on the inputs that h and the Hessian come from, `fresh_output_error` the same on as many new
ones. Seconds are the median after one run that is not counted. `ratio_to_irls` is theirs to those of `irls`, which is
timed anew beside each of them, for machines have faster and slower minutes.

dashq stores scales and offsets in float16; HQQ's scales and real zeros stay in float32, as do GPTQ's scales, and
GPTQ's zeros are integers. Each rival is installed, in a pinned version, in an environment of its own.
"""

import argparse
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bench._environments import PROGRAMS, Unavailable, command, installed
from bench._record import result_line
from bench._rival_worker import timed
from dashq import Diagonal, Grid, Grouping, Quantized, load_registry
from dashq.solving.arithmetic import encode, group_importance, minmax_parameters, quantized, weighted_error
from dashq.solving.stored_values import store

RIVALS = ("hqq", "llm-compressor", "gptqmodel")
UNIT_REPEAT = 9  # runs of `irls` beside each of the others
WORKER = Path(__file__).with_name("_rival_worker.py")
Solve = Callable[[Tensor, Diagonal, Grouping, Grid], Quantized]


@dataclass(frozen=True, eq=False)
class Task:
    """One layer to quantize; `fresh` are inputs that no solver sees."""

    weight: Tensor
    inputs: Tensor
    fresh: Tensor
    bits: int
    group: int
    repeat: int

    @property
    def curvature(self) -> Diagonal:
        return Diagonal(self.inputs.square().mean(0))


def main() -> None:
    """Draw the layer and print one line for each solver."""
    solvers: dict[str, Solve] = {
        "irls": load_registry().solvers["irls"]().solve,
        "closed_form": load_registry().solvers["closed_form"]().solve,
        "irls-eager": eager_irls,
    }
    arguments = parse([*solvers, *RIVALS])
    task = draw(arguments)
    shape = {"rows": arguments.rows, "columns": arguments.columns, "tokens": arguments.tokens}
    running = {"threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine()}
    print(result_line({**shape, "bits": task.bits, "group": task.group, **running}), flush=True)
    for name in sorted(arguments.only, key=[*solvers, *RIVALS].index):
        label = {"solver": name, **({"version": PROGRAMS[name][0][-1]} if name in RIVALS else {})}
        try:
            found = ours(solvers[name], task) if name in solvers else rival(name, task, arguments.environments)
        except Unavailable as reason:
            print(result_line({**label, "unavailable": str(reason)}), flush=True)
            continue
        unit = ours(solvers["irls"], replace(task, repeat=UNIT_REPEAT))[1]
        print(result_line({**label, **figures(task, *found), "ratio_to_irls": round(found[1] / unit, 2)}), flush=True)


def parse(names: list[str]) -> argparse.Namespace:
    """The options."""
    summary, _, explanation = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench rivals", description=summary, epilog=explanation)
    for option, default in {
        "rows": 4096,
        "columns": 4096,
        "group": 128,
        "bits": 2,
        "tokens": 4096,
        "repeat": 3,
    }.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument(
        "--environments", type=Path, default=Path("out/environments"), help="where rivals are installed"
    )
    arguments = parser.parse_args()
    if arguments.columns % arguments.group or arguments.repeat < 1:
        parser.error("the group size must divide the columns, and --repeat be at least 1")
    return arguments


def draw(arguments: argparse.Namespace) -> Task:
    """The layer that the docstring of this module describes."""
    torch.manual_seed(0)
    rows, columns, tokens = arguments.rows, arguments.columns, arguments.tokens
    weight = 0.02 * torch.randn(rows, columns)
    weight[:, torch.randperm(columns)[: columns // 64]] *= 4
    factors = max(1, columns // 16)
    mixing, scales = torch.randn(factors, columns) / factors**0.5, torch.randn(columns).exp()
    drawn = torch.randn(2 * tokens, columns).addmm_(torch.randn(2 * tokens, factors), mixing).mul_(scales)
    return Task(weight, drawn[:tokens], drawn[tokens:], arguments.bits, arguments.group, arguments.repeat)


def ours(solve: Solve, task: Task) -> tuple[Tensor, float]:
    """Dequantized weights and seconds of one of dashq's solvers."""
    grouping = Grouping(columns=task.weight.shape[1], size=task.group)
    grid = Grid(bits=task.bits, dtype=torch.float16)
    curvature = task.curvature

    def dequantize(found: object) -> Tensor:
        assert isinstance(found, Quantized)
        return found.dequantize()

    return timed(lambda: (lambda: solve(task.weight, curvature, grouping, grid), dequantize), task.repeat)


def eager_irls(weight: Tensor, curvature: Diagonal, grouping: Grouping, grid: Grid) -> Quantized:
    """The alternation of `irls` in plain PyTorch: 9 times round, then fit by weighted least squares, from min-max."""
    w, h = grouping.split(weight), group_importance(curvature, grouping)
    scale, offset = minmax_parameters(w, grid)
    mean = (h * w).sum(-1)
    for _ in range(9):
        codes = encode(w, scale, offset, grid)
        mean_code = (h * codes).sum(-1)
        centered = codes - mean_code[..., None]
        variance, covariance = (h * centered.square()).sum(-1), (h * centered * w).sum(-1)
        scale = torch.where(variance > 1e-9, covariance / variance, scale)
        offset = mean - scale * mean_code
    return quantized(w, *store(scale, offset, grid), grid, grouping)


def rival(name: str, task: Task, environments: Path) -> tuple[Tensor, float]:
    """Dequantized weights and seconds of a rival, run in its environment on as many threads as this process uses."""
    python = installed(PROGRAMS[name], environments / name)
    with tempfile.TemporaryDirectory() as folder:
        layer, result = Path(folder) / "layer.pt", Path(folder) / "result.pt"
        second_moment = task.inputs.T @ task.inputs / len(task.inputs)
        torch.save({"weight": task.weight, "second_moment": second_moment}, layer)
        options = {"bits": task.bits, "group": task.group, "repeat": task.repeat, "threads": torch.get_num_threads()}
        settings = [f"--{option}={value}" for option, value in options.items()]
        command([str(python), str(WORKER), name, str(layer), str(result), *settings])
        found = torch.load(result, weights_only=True)
    return found["weight"], found["seconds"]


def figures(task: Task, found: Tensor, seconds: float) -> dict[str, float]:
    """One row of the table, but for the ratio."""
    difference = (task.weight - found).T
    outputs = {"output_error": task.inputs, "fresh_output_error": task.fresh}
    return {
        "seconds": round(seconds, 4),
        "nanoseconds_per_weight": round(1e9 * seconds / task.weight.numel(), 2),
        "weighted_error": weighted_error(task.weight, found, task.curvature),
        **{key: float((x @ difference).norm() ** 2 / (x @ task.weight.T).norm() ** 2) for key, x in outputs.items()},
    }


if __name__ == "__main__":
    main()
