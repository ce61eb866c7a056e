"""Seconds of the parts that a hybrid run of SmolLM2 consists of: passes, curvature, error feedback, descent, ...

The run is in this process, after one on two samples in which kernels are compiled or loaded. A part within another
counts for itself alone; judging counts as a whole, passes included.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import dashq
from bench._record import result_line
from bench.robustness import RECIPE, settings_of
from dashq.calibration.folds import Fold
from dashq.calibration.paused import PausedPasses
from dashq.calibration.stream import Stream
from dashq.measuring.judgement import Judge
from dashq.results.output import Output
from dashq.results.parts import Parts
from dashq.results.report import read_report
from dashq_plugins.estimators.hybrid import HybridEstimator
from dashq_plugins.solvers.feedback import error_feedback, solver
from dashq_plugins.solvers.feedback.joint import Joint

JUDGING = "judging"
# Functions and methods by the part that they are, each as the object that has it and its name there.
PARTS: dict[str, list[tuple[Any, str]]] = {
    "passes": [(PausedPasses, "inputs"), (PausedPasses, "finish"), (Stream, "advance"), (Stream, "observe")],
    "second moments and chunks": [(HybridEstimator, "update"), (HybridEstimator, "finish")],
    "drift and its sums": [(Fold, "see")],
    "factorization": [(error_feedback, "factorize")],
    "start": [(solver, "solve_in_pieces")],
    "feedback": [(solver, "feed_back")],
    "descent": [(solver, "descend")],
    "objective": [(Joint, "objective")],
    "writing": [(Parts, "add"), (Output, "finish")],
    JUDGING: [(Judge, "pass_original"), (Judge, "pass_quantized"), (Judge, "judgement")],
}
REST = "all else"


class Stopwatch:
    """Seconds by part, of which one is going on at any time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._parts, self._since = [REST], time.perf_counter()

    @contextmanager
    def within(self, part: str) -> Generator[None]:
        """Count the time that the `with` statement takes to a part, and not to the one around it."""
        self._charge()
        self._parts.append(self._parts[-1] if JUDGING in self._parts else part)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def stop(self) -> dict[str, float]:
        """Seconds by part, until now."""
        self._charge()
        return {part: round(self.seconds[part], 2) for part in (*PARTS, REST)}

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now


def main() -> None:
    """Print one line with the seconds of each part."""
    parser = argparse.ArgumentParser(prog="python -m bench parts", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="in each sample")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--note", default="", help="what else is to be known, as other work on the machine")
    arguments = parser.parse_args()
    samples, arguments.samples = arguments.samples, 2
    measure(arguments)
    arguments.samples = samples
    parts, phases = measure(arguments)
    figures = {
        "recipe": "hybrid",
        "threads": torch.get_num_threads(),
        "text": f"{Path(arguments.calibration).name}, {samples} x {arguments.tokens}",
        "dtype": arguments.dtype,
        "parts": parts,
        "phases": phases,
    }
    print(result_line(figures | ({"note": arguments.note} if arguments.note else {})))


def measure(arguments: argparse.Namespace) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a run by part, and by phase as its report has them."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = settings_of("hybrid", arguments, f"{folder}/out", arguments.dtype)
        recipe = dashq.load_recipe(Path(RECIPE), dashq.load_registry(), settings)
        watch = Stopwatch()
        for part, places in PARTS.items():
            for owner, name in places:
                stack.enter_context(patch.object(owner, name, timed(watch, part, getattr(owner, name))))
        dashq.run(recipe)
        return watch.stop(), dict(read_report(Path(folder) / "out").seconds)


def timed(watch: Stopwatch, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which counts to a part; of an iterator that it returns, each value does."""

    def timed_values(values: Iterator[Any]) -> Iterator[Any]:
        while True:
            with watch.within(part):
                try:
                    value = next(values)
                except StopIteration:
                    return
            yield value

    def timed_function(*args: Any, **kwargs: Any) -> Any:
        with watch.within(part):
            result = function(*args, **kwargs)
        return timed_values(result) if isinstance(result, Iterator) else result

    return timed_function


if __name__ == "__main__":
    main()
