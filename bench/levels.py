"""The three levels of `dashq run MODEL --bits BITS`: seconds, and perplexity on two texts, one line for each.

Each run is a process of its own on as many threads as this one, and one follows the other: `--fast`, neither of the
two, `--best`. CPU seconds are those of the whole process, which other work on the machine changes least.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench._record import result_line
from bench.seconds import cpu_seconds_of_children
from bench.tuner import judge
from dashq.results.report import read_report

LEVELS = {"fast": ["--fast"], "usual": [], "best": ["--best"]}


def main() -> None:
    """Print one line for each level."""
    parser = argparse.ArgumentParser(prog="python -m bench levels", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--bits", default="2.5", help="as `dashq run` takes them")
    parser.add_argument("--text", default="pydoc", help="to calibrate on, and to tune on")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=[*LEVELS])
    parser.add_argument("--test", nargs="+", default=["pydoc=pydoc"], help="texts to judge on, each as NAME=SOURCE")
    parser.add_argument("--windows", type=int, nargs="+", default=[20, 8], help="of each test text, the first ones")
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 1024], help="tokens in these windows")
    parser.add_argument("--dtype", default="auto", help="to judge in")
    arguments = parser.parse_args()
    for level in arguments.levels:
        print(result_line(measure(level, arguments)), flush=True)


def measure(level: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one level."""
    dashq = str(Path(sys.executable).with_name("dashq"))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        wish = ["--bits", arguments.bits, "--text", arguments.text, "--output", str(output), *LEVELS[level]]
        before, begin = cpu_seconds_of_children(), time.perf_counter()
        subprocess.run([dashq, "run", arguments.model, *wish, "--quiet"], check=True)
        seconds, cpu_seconds = time.perf_counter() - begin, cpu_seconds_of_children() - before
        report = read_report(output)
        return {
            "level": level,
            "bits": arguments.bits,
            "text": Path(arguments.text).name,
            "threads": torch.get_num_threads(),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu_seconds, 1),
            "phases": report.seconds,
            "bits_per_weight": report.totals.bits_per_weight,
            "windows": arguments.windows[: len(arguments.test)],
            "context": arguments.context[: len(arguments.test)],
            "perplexity": judge(output, arguments),
        }


if __name__ == "__main__":
    main()
