"""SmolLM2 at 2 bits, group 64, against how much text calibrates it, on that kind of text and on another.

Each result is a `dashq run` in a process of its own, then perplexity over the first windows of every test text. What
stands in the file of results already is not measured again.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bench._record import result_line
from bench.memory import _peak
from dashq.calibration.tokens import evaluation_windows
from dashq.measuring.evaluate import Loaded, load_model, perplexity
from dashq.results.report import read_report
from dashq.text_source import TextSource

Figures = dict[str, Any]
RECIPE = "recipes/smollm2_2bit.yaml"
# Estimator, solver, whose outputs the next layer sees, and the share of what they change that weights undo.
METHODS = {
    "rtn": ("diagonal", "rtn", "original", 0.0),
    "paper": ("diagonal", "{name: irls, preset: paper}", "original", 0.0),
    "closed_form": ("diagonal", "closed_form", "original", 0.0),
    "full": ("full", "feedback", "sequential", 0.5),
    "hybrid": ("hybrid", "feedback", "sequential", 0.5),
    # What each of these brings (decision 22).
    "hybrid_quantized": ("hybrid", "feedback", "quantized", 0.0),
    "hybrid_sequential": ("hybrid", "feedback", "sequential", 0.0),
}
DEFAULT = ("original", "rtn", "paper", "closed_form", "full", "hybrid")


def main() -> None:
    """Measure every method at every number of samples, printing and keeping each line when it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench robustness", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", nargs="+", default=["pydoc=pydoc"], help="texts to judge on, each as NAME=SOURCE")
    parser.add_argument("--methods", nargs="+", choices=["original", *METHODS], default=DEFAULT)
    parser.add_argument("--samples", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--tokens", type=int, default=512, help="in each sample")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=20, help="of each test text, the first ones")
    parser.add_argument("--context", type=int, default=2048, help="tokens in each window")
    parser.add_argument("--output", type=Path, default=Path("bench/results/robustness.jsonl"))
    arguments = parser.parse_args()
    complete(
        arguments.output,
        (
            (asked, partial(measure, method, asked, arguments))
            for samples in arguments.samples
            for method in arguments.methods
            for asked in [wanted(method, samples, arguments)]
        ),
    )


def complete(output: Path, requests: Iterable[tuple[Figures, Callable[[], Figures]]]) -> None:
    """Measure what is asked and does not stand in the file yet, printing and keeping each line when it is there."""
    known = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    for asked, measured in requests:
        if not any(asked.items() <= line.items() for line in known):
            known.append(asked | measured())
            result = result_line(known[-1])
            print(result, flush=True)
            with output.open("a") as lines:
                lines.write(result + "\n")


def wanted(method: str, samples: int, arguments: argparse.Namespace) -> Figures:
    """What makes a result what it is; neither the original nor rounding depends on how much text calibrates it."""
    asked = {"method": method, "windows": arguments.windows, "context": arguments.context}
    if method == "original":
        return asked
    asked |= {"bits": arguments.bits}
    if method == "rtn":
        return asked
    return asked | {"samples": samples, "sequence_length": arguments.tokens, "seed": arguments.seed}


def measure(method: str, asked: Figures, arguments: argparse.Namespace) -> Figures:
    """Quantize, and judge on every text."""
    if method == "original":
        return {"bits_per_weight": 16.0, "perplexity": judge(load_model(arguments.model), arguments)}
    with tempfile.TemporaryDirectory() as folder:
        figures = quantize(method, asked, arguments, Path(folder) / "out", asked.get("settings", []))
        loaded = load_model(f"{folder}/out")
        loaded.network.dequantize()  # a packed layer would unpack itself for every window
        return figures | {"perplexity": judge(loaded, arguments)}


def settings_of(method: str, arguments: argparse.Namespace, output: str, dtype: str) -> list[str]:
    """The settings of one of these methods, with which the recipe calibrates as the `arguments` say."""
    estimator, solver, propagate, correction = METHODS[method]
    return [
        f"model={arguments.model}",
        f"output={output}",
        f"dtype={dtype}",
        f"calibration.dataset={arguments.calibration}",
        f"calibration.samples={arguments.samples}",
        f"calibration.sequence_length={arguments.tokens}",
        f"calibration.propagate={propagate}",
        f"calibration.error_correction={correction}",
        f"scheme.estimator={estimator}",
        f"scheme.solver={solver}",
        "tuner=null",
        "embeddings=null",
    ]


def quantize(
    method: str,
    asked: Figures,
    arguments: argparse.Namespace,
    output: Path,
    more: Sequence[str] = (),
) -> Figures:
    """What `dashq run` takes, with `more` settings of its recipe."""
    estimator, solver, propagate, correction = METHODS[method]
    settings = {
        "model": arguments.model,
        "output": output,
        "certificate_groups": 0,
        "calibration.dataset": arguments.calibration,
        "calibration.samples": asked.get("samples", 1),
        "calibration.sequence_length": arguments.tokens,
        "calibration.seed": arguments.seed,
        "calibration.propagate": propagate,
        "calibration.error_correction": correction,
        "scheme.bits": asked["bits"],
        "scheme.estimator": estimator,
        "scheme.solver": solver,
        "tuner": "null",
        "embeddings": "null",
    }
    command = [str(Path(sys.executable).with_name("dashq")), "run", RECIPE, "--quiet"]
    start = time.perf_counter()
    peak = _peak(
        command + [f"--set={key}={value}" for key, value in settings.items()] + [f"--set={one}" for one in more]
    )
    seconds = time.perf_counter() - start
    report = read_report(output)
    gammas = [layer.statistics["gamma"] for layer in report.layers if "gamma" in layer.statistics]
    return {
        "bits_per_weight": report.totals.bits_per_weight,
        "seconds": seconds,
        "phases": report.seconds,
        "peak_bytes": peak,
    } | ({"gamma": sum(gammas) / len(gammas)} if gammas else {})


def judge(loaded: Loaded, arguments: argparse.Namespace) -> dict[str, float]:
    """Perplexity on every test text."""
    texts: dict[str, Tensor] = {}
    for test in arguments.test:
        name, _, source = test.partition("=")
        text = TextSource(name=source, split="test" if source == "pydoc" else "train")
        texts[name] = evaluation_windows(text, loaded.tokenizer, arguments.context, arguments.windows)
    return {name: perplexity(loaded.network, windows) for name, windows in texts.items()}


if __name__ == "__main__":
    main()
