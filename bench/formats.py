"""SmolLM2-135M-Instruct in every format: size, perplexity, and what other programs make of the files.

Calibrated in one shot on 16 × 2048 tokens; perplexity over windows of 2048 tokens, spread evenly over the text,
with dashq's own opening of the files in bfloat16. Rows of 576 columns are no super-blocks, so in a GGUF file only
`down_proj` is of type Q2_K, the rest of type Q4_1. `gguf-Q2_K-flat` is the same search with every column equally
important.

`--program mlx=/path/to/python` names an interpreter that has the program, and dashq; it runs `dashq verify --with`.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer

import dashq
from bench.smollm2 import spread
from dashq import Curvature, Diagonal, Estimator, Layer, hookimpl
from dashq.checkpoint import open_checkpoint, open_network
from dashq.evaluate import perplexity
from dashq.tokens import TextSource, evaluation_windows

RECIPE = Path("recipes/smollm2_2bit.yaml")
PLAIN = ["scheme.bits=2", "scheme.grouper={name: contiguous, size: 64}", "scheme.solver=closed_form"]
GGUF = [
    "serializer={name: gguf, four_bits: Q4_1}",
    "scheme.bits=4",
    "scheme.grouper={name: contiguous, size: 32}",
    "scheme.solver=closed_form",
]
K_QUANT = "solver: k_quant, bits: 2, grouper: {name: contiguous, size: 16}"
FORMATS: dict[str, list[str]] = {
    "dashq": [*PLAIN, "serializer=dashq"],
    "mlx": [*PLAIN, "serializer=mlx"],
    "metal": [*PLAIN, "serializer=metal"],
    "dashq-packed-linear": [*PLAIN, "serializer=dashq-packed-linear"],
    "gptq": [*PLAIN, "serializer=gptq"],
    "compressed-tensors": [*PLAIN, "serializer=compressed-tensors"],
    "compressed-tensors-integer": [*PLAIN, "serializer={name: compressed-tensors, zero: integer}"],
    "gguf-Q4_1": [*GGUF],
    "gguf-Q2_K": [*GGUF, f"overrides=[{{match: '.*down_proj', {K_QUANT}}}]"],
    "gguf-Q2_K-flat": [*GGUF, f"overrides=[{{match: '.*down_proj', {K_QUANT}, estimator: flat}}]"],
}


class FlatEstimator(Estimator):
    """Every column is as important as any other."""

    name = "flat"

    def start(self, layer: Layer) -> Any:
        return torch.ones(layer.columns)

    def update(self, state: Any, x: Float[Tensor, "tokens columns"], token_weight: Float[Tensor, " tokens"]) -> Any:
        return state

    def merge(self, state: Any, other: Any) -> Any:
        return state

    def finish(self, state: Any) -> Curvature:
        return Diagonal(state)


class _Plugin:
    @hookimpl
    def dashq_estimators(self) -> list[type[Estimator]]:
        return [FlatEstimator]


def main() -> None:
    """Print one line for each format."""
    parser = argparse.ArgumentParser(prog="python -m bench formats", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--test", default="pydoc")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--program", nargs="*", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--folder", type=Path, default=Path("out/formats"))
    arguments = parser.parse_args()
    programs = dict(entry.split("=", 1) for entry in arguments.program)
    for name in arguments.only:
        print(json.dumps(measure(name, arguments, programs)), flush=True)


def measure(name: str, arguments: argparse.Namespace, programs: dict[str, str]) -> dict[str, Any]:
    """Make, judge and verify one result."""
    folder = arguments.folder / name
    settings = [f"model={arguments.model}", f"output={folder}", f"calibration.dataset={arguments.calibration}"]
    settings += ["calibration.samples=16", "calibration.tokens=2048", "certificate=0", "dtype=bfloat16", "overrides=[]"]
    settings += ["scheme.estimator=diagonal", "calibration.propagate=original"]
    recipe = dashq.load_recipe(RECIPE, dashq.load_registry(_Plugin()), [*settings, *FORMATS[name]])
    if not (folder / "report.json").exists():
        dashq.run(recipe)
    report = json.loads((folder / "report.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = evaluation_windows(TextSource(name=arguments.test, split="test"), tokenizer, 2048, None)
    network = open_network(folder, torch.bfloat16)
    verified = {
        program: verify(folder, program, programs[program])
        for program in open_checkpoint(folder).serializer.programs
        if program in programs
    }
    return {
        "format": name,
        "perplexity": perplexity(network, spread(windows, arguments.windows)),
        "bits_per_weight": report["totals"]["bits_per_weight"],
        "bytes_on_disk": report["totals"]["bytes_on_disk"],
        "mean_error": report["totals"]["mean_error"],
        "solve_seconds": report["seconds"]["solve"],
        "verified": verified,
    }


def verify(folder: Path, program: str, python: str) -> str:
    """What `dashq verify --with` says in another environment."""
    words = [python, "-c", "import dashq_cli; dashq_cli.main()", "verify", str(folder), "--with", program]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    lines = [line.strip() for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    return f"exit {done.returncode}: " + "; ".join(" ".join(line.split()) for line in lines[-4:])


if __name__ == "__main__":
    main()
