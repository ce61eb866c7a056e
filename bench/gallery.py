"""SmolLM2 by strategies of strangers, and by a scheme with more bits where it matters: each beside the usual choice.

The plugins of `examples/plugins` have to be installed. First comes the error of the weights alone, by solver and
grouper, in which no text has a say. Then each result is a `dashq run` in a process of its own, then
perplexity over the first windows of every test text. What stands in the file of results already is not measured again.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from bench.robustness import Figures, complete, measure
from dashq import Diagonal, Grid, load_registry

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
WEIGHTS = [("rtn", "contiguous"), ("rtn", "by_magnitude"), ("stochastic", "contiguous")]


def main() -> None:
    """Measure every case, printing and keeping each line when it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench gallery", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", nargs="+", default=["pydoc=pydoc"], help="texts to judge on, each as NAME=SOURCE")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="in each sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=20, help="of each test text, the first ones")
    parser.add_argument("--context", type=int, default=2048, help="tokens in each window")
    parser.add_argument("--output", type=Path, default=Path("bench/results/gallery.jsonl"))
    arguments = parser.parse_args()
    requests = [
        (asked, partial(error_of_weights, arguments.model, asked))
        for solver, grouper in WEIGHTS
        for bits in (2, 3, 4)
        for asked in [{"case": "weights", "solver": solver, "grouper": grouper, "bits": bits}]
    ]
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


def error_of_weights(model: str, asked: Figures) -> Figures:
    """The mean of |W - Ŵ|² / |W|² over the linear layers of all blocks, every column counting alike."""
    registry, errors = load_registry(), []
    solver, grouper = registry.solvers[asked["solver"]](), registry.groupers[asked["grouper"]]()
    grid = Grid(bits=asked["bits"], dtype=torch.float16)
    for name, tensor in load_file(Path(model) / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            weight, flat = tensor.float(), Diagonal(torch.ones(tensor.shape[1]))
            quantized = solver.solve(weight, flat, grouper.group(weight, flat), grid)
            errors.append(float((quantized.dequantize() - weight).square().sum() / weight.square().sum()))
    return {"layers": len(errors), "relative_error": sum(errors) / len(errors)}


if __name__ == "__main__":
    main()
