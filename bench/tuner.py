"""SmolLM2 before and after its tuner: perplexity on the kind of text that it learned from and on another, and seconds.

Each start is one `dashq run` without a tuner; every tuner then works on a copy of that result, as `dashq tune` does.
What stands in the file of results already is not measured again.
"""

import argparse
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer

from bench.robustness import Figures, complete, quantize
from dashq import DashqLinear, TextSource, load_registry
from dashq.calibration.tokens import evaluation_windows
from dashq.device import choose_dtype
from dashq.measuring.evaluate import perplexity
from dashq.results.checkpoint import open_network
from dashq.results.report import read_report
from dashq.strategies import Tuner
from dashq.tune import recipe_to_tune, tune_result

REGISTRY = load_registry()


def main() -> None:
    """Measure every tuner from every start, printing and keeping each line when it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench tuner", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on, and to tune on")
    parser.add_argument("--test", nargs="+", default=["pydoc=pydoc"], help="texts to judge on, each as NAME=SOURCE")
    parser.add_argument("--starts", nargs="+", default=["hybrid 2 dashq"], help="each as 'METHOD BITS FORMAT'")
    parser.add_argument("--tuners", nargs="+", default=["", "{name: distill}"], help="in YAML; '' is none")
    parser.add_argument("--samples", type=int, default=16, help="to calibrate on")
    parser.add_argument("--tokens", type=int, default=512, help="in each of them")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--windows", type=int, nargs="+", default=[20, 8], help="of each test text, the first ones")
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 1024], help="tokens in these windows")
    parser.add_argument("--dtype", default="auto", help="to tune and to judge in")
    parser.add_argument("--set", nargs="*", default=[], help="more settings of the starts' recipe, each as KEY=VALUE")
    parser.add_argument("--work", type=Path, help="keeps the starts there, so that they serve again")
    parser.add_argument("--output", type=Path, default=Path("bench/results/tuner.jsonl"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = arguments.work or Path(folder)
        requests = []
        for start in arguments.starts:
            for text in arguments.tuners:
                tuner = read_tuner(text)
                asked = wanted(start, tuner, arguments)
                requests.append((asked, partial(measure, start, tuner, asked, arguments)))
        complete(arguments.output, requests)


def read_tuner(text: str) -> Tuner | None:
    """The tuner that an entry of a recipe stands for."""
    fields = yaml.safe_load(text) if text else None
    return REGISTRY.tuners[fields.pop("name")].model_validate(fields) if fields else None


def wanted(start: str, tuner: Tuner | None, arguments: argparse.Namespace) -> Figures:
    """What makes a result what it is."""
    method, bits, serializer = start.split()
    return {
        "method": method,
        "bits": int(bits),
        "format": serializer,
        "settings": arguments.set,
        "samples": arguments.samples,
        "sequence_length": arguments.tokens,
        "seed": arguments.seed,
        "tuner": tuner.model_dump(mode="json") if tuner else None,
        "text": Path(arguments.calibration).stem,
        "windows": arguments.windows[: len(arguments.test)],
        "context": arguments.context[: len(arguments.test)],
        "dtype": arguments.dtype,
    }


def measure(start: str, tuner: Tuner | None, asked: Figures, arguments: argparse.Namespace) -> Figures:
    """Quantize where that was not done before, tune, and judge on every text."""
    name = re.sub(r"[^\w.=-]+", "_", "-".join([*start.split(), str(arguments.seed), *arguments.set]))
    base, output = arguments.work / name, arguments.work / "tuned"
    figures: Figures = {}
    if not (base / "report.json").exists():
        more = [f"serializer={asked['format']}", *arguments.set]
        figures = quantize(asked["method"], asked, arguments, base, more)
    if tuner:
        recipe = recipe_to_tune(base, tuner, REGISTRY).model_copy(update={"output": output, "dtype": arguments.dtype})
        begin = time.perf_counter()
        tune_result(base, recipe, overwrite=True)
        figures = {"seconds": time.perf_counter() - begin}
    report = read_report(output if tuner else base)
    figures |= {"bits_per_weight": report.totals.bits_per_weight, "phases": report.seconds}
    if report.tuned:
        figures["divergence"] = [[check.step, check.divergence] for check in report.tuned.checks]
    return figures | {"perplexity": judge(output if tuner else base, arguments)}


def judge(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Perplexity on every test text."""
    network: Any = open_network(folder, choose_dtype(arguments.dtype, torch.device("cpu")))
    if any(isinstance(module, DashqLinear) for module in network.modules()):
        network.dequantize()  # a packed layer would unpack itself for every window
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures = {}
    for test, windows, context in zip(arguments.test, arguments.windows, arguments.context, strict=False):
        name, _, source = test.partition("=")
        text = TextSource(name=source, split="test" if source == "pydoc" else "train")
        figures[name] = perplexity(network, evaluation_windows(text, tokenizer, context, windows))
    return figures


if __name__ == "__main__":
    main()
