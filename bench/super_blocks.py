"""SmolLM2 with its `down_proj` in GGUF's super-blocks: `k_quant` under the diagonal beside `feedback` under all of H.

Rows of 576 columns are no super-blocks, so all other layers stay as they are. Perplexity is over the first windows of
every test text. What stands in the file of results already is not measured again.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from bench.robustness import METHODS, Figures, complete, quantize
from bench.tuner import judge
from dashq import load_registry

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
DIAGONAL = {"k_quant": ("diagonal", "k_quant", "original", 0.0)}


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
        figures = quantize(method, asked, arguments, output, [*settings, *arguments.set])
        return figures | {"perplexity": judge(output, arguments)}


if __name__ == "__main__":
    main()
