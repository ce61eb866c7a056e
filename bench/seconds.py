"""Seconds of `dashq run` by phase, memory, and what `dashq plan` says beforehand, of some recipes in turn.

Each run is a process of its own on as many threads as this one; the recipes are run one after the other, and that again
as often as asked. CPU seconds are those of the whole process, which other work on the machine changes least.
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import torch

import dashq
from bench._record import result_line
from bench.memory import _peak
from bench.robustness import METHODS, RECIPE, settings_of
from dashq.estimate import estimate
from dashq.quantizing.opening import open_model, plan_model
from dashq.results.report import read_report


def main() -> None:
    """Print one line for each run."""
    parser = argparse.ArgumentParser(prog="python -m bench seconds", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["closed_form", "hybrid"])
    parser.add_argument("--tuners", nargs="+", default=[""], help="in YAML; '' is none")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="in each sample")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--note", default="", help="what else is to be known, as other work on the machine")
    arguments = parser.parse_args()
    baseline = _peak([sys.executable, "-c", "import dashq; dashq.load_registry()"])
    for _ in range(arguments.repeat):
        for method in arguments.methods:
            for tuner in arguments.tuners:
                print(result_line(measure(method, tuner, arguments, baseline)), flush=True)


def measure(method: str, tuner: str, arguments: argparse.Namespace, baseline: int) -> dict[str, object]:
    """The figures of one run; bytes are those beyond a process that has only imported dashq."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(method, arguments, f"{folder}/out", arguments.dtype)
        settings = [*settings, f"tuner={tuner}"] if tuner else settings
        recipe = dashq.load_recipe(Path(RECIPE), dashq.load_registry(), settings)
        model = open_model(recipe)
        expected = estimate(model, plan_model(recipe, model), recipe)
        command = [str(Path(sys.executable).with_name("dashq")), "run", RECIPE, "--quiet"]
        before = cpu_seconds_of_children()
        peak = _peak(command + [f"--set={setting}" for setting in settings])
        report = read_report(Path(folder) / "out")
    return {
        "recipe": method,
        "threads": torch.get_num_threads(),
        "text": f"{Path(arguments.calibration).name}, {arguments.samples} x {arguments.tokens}",
        "seconds": report.seconds,
        "cpu_seconds": round(cpu_seconds_of_children() - before, 1),
        "estimated_seconds": round(expected.seconds, 1),
        "bytes": peak - baseline,
        "estimated_bytes": round(expected.memory),
        "perplexity": report.judgement.perplexity if report.judgement else None,
        **({"tuner": report.tuned.tuner} if report.tuned else {}),
    } | ({"note": arguments.note} if arguments.note else {})


def cpu_seconds_of_children() -> float:
    """User and system time of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
