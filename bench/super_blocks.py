"""SmolLM2 with its `down_proj` in GGUF's super-blocks: `k_quant` under the diagonal beside `feedback` under all of H.

Rows of 576 columns are no super-blocks, so all other layers stay as they are. `llama.cpp` is what llama-quantize makes
of the importances that `k_quant` is given, by its own function for rows, where llama-cpp-python is installed.
Perplexity is over the first windows of every test text. What stands in the file of results already is not measured
again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench._k_quants import LlamaCppSolver
from bench.files import version
from bench.robustness import METHODS, RECIPE, Figures, complete, quantize, settings_of
from bench.tuner import judge
from dashq import Solver, hookimpl, load_recipe, load_registry, run
from dashq.results.report import read_report

ONLY_DOWN = "overrides=[{match: '.*(?<!down_proj)', skip: true}]"
# By its name in GGUF: the bits, and what the format is told beside them.
TYPES = {
    "Q2_K": (2, {}),
    "IQ2_S": (2, {"two_bits": "IQ2_S"}),
    "Q3_K": (3, {}),
    "IQ3_S": (3, {"three_bits": "IQ3_S"}),
    "Q4_K": (4, {}),
    "IQ4_XS": (4, {"four_bits": "IQ4_XS"}),
}
LLAMA_CPP = "llama.cpp"
DIAGONAL = {
    "k_quant": ("diagonal", "k_quant", "original", 0.0),
    LLAMA_CPP: ("diagonal", LlamaCppSolver.name, "original", 0.0),
}


class _Plugin:
    @hookimpl
    def dashq_solvers(self) -> list[type[Solver]]:
        return [LlamaCppSolver]


def main() -> None:
    """Measure every method with every type, printing and keeping each line when it is there."""
    METHODS.update(DIAGONAL)
    parser = argparse.ArgumentParser(prog="python -m bench super_blocks", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", nargs="+", default=["pydoc=pydoc"], help="texts to judge on, each as NAME=SOURCE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["k_quant", "hybrid"])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="of the layers' blocks")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="in each sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, nargs="+", default=[20, 8], help="of each test text, the first ones")
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 1024], help="tokens in these windows")
    parser.add_argument("--dtype", default="auto", help="to judge in")
    parser.add_argument("--set", nargs="*", default=[], help="more settings of the recipe, each as KEY=VALUE")
    parser.add_argument("--output", type=Path, default=Path("bench/results/super_blocks.jsonl"))
    arguments = parser.parse_args()
    requests = []
    for kind in arguments.types:
        for method in arguments.methods:
            asked = {
                "method": method,
                "type": kind,
                "bits": TYPES[kind][0],
                "samples": arguments.samples,
                "sequence_length": arguments.tokens,
                "seed": arguments.seed,
                "settings": arguments.set,
                "text": Path(arguments.calibration).stem,
                "windows": arguments.windows[: len(arguments.test)],
                "context": arguments.context[: len(arguments.test)],
                "dtype": arguments.dtype,
            }
            if method == LLAMA_CPP:
                asked["version"] = f"llama-cpp-python=={version('llama_cpp')}"
            requests.append((asked, partial(measure, method, asked, arguments)))
    complete(arguments.output, requests)


def measure(method: str, asked: Figures, arguments: argparse.Namespace) -> Figures:
    """Quantize `down_proj` alone, and judge on every text."""
    bits, serializer = TYPES[asked["type"]]
    blocks = load_registry().serializers["gguf"](**serializer).grid(bits).super_blocks
    assert blocks
    settings = [
        f"serializer={json.dumps({'name': 'gguf', **serializer})}",
        f"scheme.grouper={{name: contiguous, size: {blocks.size}}}",
        ONLY_DOWN,
    ]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        make = quantize_with_llama_cpp if method == LLAMA_CPP else quantize
        figures = make(method, asked, arguments, output, [*settings, *arguments.set])
        return figures | {"perplexity": judge(output, arguments)}


def quantize_with_llama_cpp(
    method: str, asked: Figures, arguments: argparse.Namespace, output: Path, more: Sequence[str]
) -> Figures:
    """A run whose solver is llama.cpp's, which no other process knows."""
    settings = settings_of(method, arguments, str(output), "auto")
    settings += [f"calibration.seed={arguments.seed}", f"scheme.bits={asked['bits']}", "certificate_groups=0", *more]
    start = time.perf_counter()
    run(load_recipe(Path(RECIPE), load_registry(_Plugin()), settings))
    seconds = time.perf_counter() - start
    report = read_report(output)
    return {"bits_per_weight": report.totals.bits_per_weight, "seconds": seconds, "phases": report.seconds}


if __name__ == "__main__":
    main()
