"""SmolLM2 by strategies of strangers, and by a scheme with more bits where it matters: each beside the usual choice.

The plugins of `examples/plugins` have to be installed. Each result is a `dashq run` in a process of its own, then
perplexity over the first windows of every test text. What stands in the file of results already is not measured again.
"""

import argparse
from functools import partial
from pathlib import Path

from bench.robustness import complete, measure

MORE_BITS = (
    "overrides=[{match: '.*down_proj', bits: 3}, "
    "{match: 'model\\.layers\\.(0|29)\\..*', bits: 4, grouper: {name: contiguous, size: 96}}]"
)
# The usual method that a case changes, the bits, and the settings by which it differs.
CASES: dict[str, tuple[str, int, list[str]]] = {
    "rtn": ("rtn", 4, []),
    "stochastic": ("rtn", 4, ["scheme.solver=stochastic"]),
    "contiguous": ("closed_form", 2, []),
    "by_magnitude": ("closed_form", 2, ["scheme.grouper={name: by_magnitude, size: 64}"]),
    "full": ("full", 2, []),
    "spatial_sign": ("full", 2, ["scheme.estimator=spatial_sign"]),
    "hybrid": ("hybrid", 2, []),
    "more bits": ("hybrid", 2, [MORE_BITS]),
}


def main() -> None:
    """Measure every case, printing and keeping each line when it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench gallery", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", nargs="+", default=["pydoc=pydoc"], help="texts to judge on, each as NAME=SOURCE")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="in each sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=20, help="of each test text, the first ones")
    parser.add_argument("--context", type=int, default=2048, help="tokens in each window")
    parser.add_argument("--output", type=Path, default=Path("bench/results/gallery.jsonl"))
    arguments = parser.parse_args()
    requests = []
    for case in arguments.cases:
        method, bits, settings = CASES[case]
        asked = {
            "case": case,
            "method": method,
            "bits": bits,
            "settings": settings,
            "samples": arguments.samples,
            "sequence_length": arguments.tokens,
            "seed": arguments.seed,
            "windows": arguments.windows,
            "context": arguments.context,
        }
        requests.append((asked, partial(measure, method, asked, arguments)))
    complete(arguments.output, requests)


if __name__ == "__main__":
    main()
