"""SmolLM2 with one kind of layer in GGUF's super-blocks: `k_quant` under the diagonal beside `feedback` under all of H.

Rows of 576 columns are no super-blocks: `down_proj` alone has whole ones, and `o_proj` once the model has got heads of
zeros, which change nothing that it computes; all other layers stay as they are. `llama.cpp` is what llama-quantize
makes of the importances that `k_quant` is given, by its own function for rows, where llama-cpp-python is installed.
Perplexity is over the first windows of every test text. What stands in the file of results already is not measured
again.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bench._k_quants import LlamaCppSolver
from bench.files import version
from bench.robustness import METHODS, RECIPE, Figures, complete, quantize, settings_of
from bench.tuner import judge
from dashq import Solver, hookimpl, load_recipe, load_registry, run
from dashq.results.report import read_report

COLUMNS = 256  # of a super-block
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
    parser.add_argument("--layers", choices=["down_proj", "o_proj"], default="down_proj")
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
    with tempfile.TemporaryDirectory() as folder:
        if arguments.layers == "o_proj":
            write_widened(arguments.model, Path(folder))
            arguments.model = folder
        complete_all(arguments)


def complete_all(arguments: argparse.Namespace) -> None:
    """Measure every method with every type."""
    requests = []
    for kind in arguments.types:
        for method in arguments.methods:
            asked = {
                "method": method,
                "layers": arguments.layers,
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


def write_widened(source: str, folder: Path) -> None:
    """Write the model with heads of zeros at the end of each attention, until `o_proj` has whole super-blocks.

    It computes the same: rows of zeros make queries, keys and values of zero, and columns of zeros pass nothing on.
    """
    model, config = AutoModelForCausalLM.from_pretrained(source), AutoConfig.from_pretrained(source)
    head = config.head_dim
    shared = config.num_attention_heads // config.num_key_value_heads  # heads that share keys and values
    heads = math.lcm(COLUMNS // math.gcd(COLUMNS, head), shared)
    heads *= math.ceil(config.num_attention_heads / heads)
    widths = {"q_proj": heads * head, "k_proj": heads // shared * head, "v_proj": heads // shared * head}
    weights = model.state_dict()
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and kind in widths:
            weights[f"{name}.weight"] = pad(module.weight, (0, 0, 0, widths[kind] - module.out_features))
        elif isinstance(module, nn.Linear) and kind == "o_proj":
            weights[f"{name}.weight"] = pad(module.weight, (0, heads * head - module.in_features))
    config.num_attention_heads, config.num_key_value_heads = heads, heads // shared
    wide = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    wide.load_state_dict(weights)
    wide.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def measure(method: str, asked: Figures, arguments: argparse.Namespace) -> Figures:
    """Quantize these layers alone, and judge on every text."""
    bits, serializer = TYPES[asked["type"]]
    blocks = load_registry().serializers["gguf"](**serializer).grid(bits).super_blocks
    assert blocks
    settings = [
        f"serializer={json.dumps({'name': 'gguf', **serializer})}",
        f"scheme.grouper={{name: contiguous, size: {blocks.size}}}",
        f"overrides=[{{match: '.*(?<!{arguments.layers})', skip: true}}]",
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
