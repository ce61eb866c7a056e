"""SmolLM2-135M-Instruct in every format at 2 bits: size, perplexity, and what other programs make of the files.

Importances are those of one shot on 16 × 2048 tokens, measured once for all formats; perplexity is over windows of 2048
tokens, spread evenly over the text, with dashq's own opening of the files in bfloat16. Group sizes bring the formats
as near to 2.5 bits per weight as they allow. Rows of 576 columns are no super-blocks: GGUF's Q2_K holds `down_proj`
alone, so a second table, with names in `down/`, quantizes that alone in several formats. `flat` is the same search
with every column equally important; `llama.cpp` is its own quantizer with our importances, for whoever asks for it
and has llama-cpp-python.

`--program mlx=/path/to/python` names an interpreter that has the program, and dashq; it runs `dashq verify --with`.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import dashq
from bench._k_quants import LlamaCppSolver
from bench._record import result_line
from bench.smollm2 import spread
from dashq import Curvature, Diagonal, Estimator, Layer, Recipe, Solver, hookimpl
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw, evaluation_windows
from dashq.measuring.evaluate import perplexity
from dashq.quantizing.opening import open_model, plan_model
from dashq.results.checkpoint import open_checkpoint, open_network
from dashq.results.report import read_report
from dashq.text_source import TextSource

RECIPE = Path("recipes/smollm2_2bit.yaml")
ONLY_DOWN = "overrides=[{match: '.*(?<!down_proj)', skip: true}]"
Q2_K = ["serializer=gguf", "scheme.bits=2", "scheme.solver=k_quant", "scheme.grouper={name: contiguous, size: 16}"]
Q4_1 = ["serializer={name: gguf, four_bits: Q4_1}", "scheme.bits=4", "scheme.grouper={name: contiguous, size: 32}"]
BY_LLAMA_CPP = "down/gguf-Q2_K-llama.cpp"
MIXED = "overrides=[{match: '.*down_proj', solver: k_quant, bits: 2, grouper: {name: contiguous, size: 16}}]"


def plain(serializer: str, size: int, *more: str) -> list[str]:
    """Settings of a format that takes any layer."""
    return [f"serializer={serializer}", f"scheme.grouper={{name: contiguous, size: {size}}}", *more]


FORMATS: dict[str, list[str]] = {
    "dashq": plain("dashq", 64),
    "mlx": plain("mlx", 64),
    "metal": plain("metal", 64),
    "dashq-packed-linear": plain("dashq-packed-linear", 64),
    "gptq": plain("gptq", 32),
    "compressed-tensors-integer": plain("{name: compressed-tensors, zero: integer}", 32),
    "compressed-tensors-symmetric": plain("compressed-tensors", 32),
    "gguf-Q4_1-with-Q2_K": [*Q4_1, MIXED],
    "down/gguf-Q2_K": [*Q2_K, ONLY_DOWN],
    "down/gguf-Q2_K-flat": [*Q2_K, ONLY_DOWN, "scheme.estimator=flat"],
    BY_LLAMA_CPP: [*Q2_K, ONLY_DOWN, "scheme.solver=llama_cpp"],
    "down/dashq": plain("dashq", 48, ONLY_DOWN),
    "down/mlx": plain("mlx", 64, ONLY_DOWN),
    "down/gptq": plain("gptq", 32, ONLY_DOWN),
}


class KnownEstimator(Estimator):
    """Importances that were measured before, by layer."""

    name = "known"
    path: Path

    def start(self, layer: Layer) -> Any:
        return layer.name

    def update(self, state: Any, x: Tensor, token_weight: Tensor) -> Any:
        return state

    def merge(self, state: Any, other: Any) -> Any:
        return state

    def finish(self, state: Any) -> Curvature:
        return Diagonal(load_file(self.path)[state])


class FlatEstimator(Estimator):
    """Every column is as important as any other."""

    name = "flat"

    def start(self, layer: Layer) -> Any:
        return torch.ones(layer.columns)

    def update(self, state: Any, x: Tensor, token_weight: Tensor) -> Any:
        return state

    def merge(self, state: Any, other: Any) -> Any:
        return state

    def finish(self, state: Any) -> Curvature:
        return Diagonal(state)


class _Plugin:
    @hookimpl
    def dashq_estimators(self) -> list[type[Estimator]]:
        return [FlatEstimator, KnownEstimator]

    @hookimpl
    def dashq_solvers(self) -> list[type[Solver]]:
        return [LlamaCppSolver]


def main() -> None:
    """Print one line for each format."""
    parser = argparse.ArgumentParser(prog="python -m bench formats", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--test", default="pydoc")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=[*FORMATS.keys() - {BY_LLAMA_CPP}], choices=FORMATS)
    parser.add_argument("--program", nargs="*", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--folder", type=Path, default=Path("out/formats"))
    arguments = parser.parse_args()
    judge = Judge(arguments)
    importance = arguments.folder / "importance.safetensors"
    if not importance.exists():
        arguments.folder.mkdir(parents=True, exist_ok=True)
        save_file(measure_importance(_recipe(arguments, [])), importance)
    for name in sorted(arguments.only, key=list(FORMATS).index):
        folder = arguments.folder / name
        if not (folder / "report.json").exists():
            dashq.run(
                _recipe(arguments, ["calibration.samples=1", "calibration.sequence_length=16", *FORMATS[name]], folder)
            )
        print(result_line({"format": name, **judge.result(folder)}), flush=True)


def _recipe(arguments: argparse.Namespace, settings: list[str], folder: Path | None = None) -> Recipe:
    output = folder or arguments.folder / "none"
    estimator = "diagonal" if folder is None else f"{{name: known, path: {arguments.folder}/importance.safetensors}}"
    usual = [f"model={arguments.model}", f"output={output}", f"calibration.dataset={arguments.calibration}"]
    usual += [
        "calibration.samples=16",
        "calibration.sequence_length=2048",
        "certificate_groups=0",
        "dtype=bfloat16",
        "overrides=[]",
        "tuner=null",
        "embeddings=null",
    ]
    usual += [f"scheme.estimator={estimator}", "calibration.propagate=original", "scheme.solver=closed_form"]
    return dashq.load_recipe(RECIPE, dashq.load_registry(_Plugin()), [*usual, *settings])


@torch.no_grad()
def measure_importance(recipe: Recipe) -> dict[str, Tensor]:
    """What the diagonal estimator finds for every layer."""
    model = open_model(recipe)
    plans = plan_model(recipe, model)
    stream = Stream(model, draw(recipe.calibration, model.tokenizer).samples)
    importance = {}
    for block in model.walk():
        own_plans = [plan for plan in plans if plan.layer.block == block.name]
        for layer, observation in observe_block(block, own_plans, stream, one_pass=True).items():
            importance[layer] = observation.curvature.diagonal()
    return importance


class Judge:
    """Perplexities, each set of numbers measured once: formats that hold the same weights share theirs."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._programs = dict(entry.split("=", 1) for entry in arguments.program)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        windows = evaluation_windows(TextSource(name=arguments.test, split="test"), tokenizer, 2048, None)
        self._windows = spread(windows, arguments.windows)
        self._known = arguments.folder / "perplexities.json"

    def result(self, folder: Path) -> dict[str, Any]:
        """The figures of a result, and what other programs say of it."""
        report = read_report(folder)
        known = json.loads(self._known.read_text()) if self._known.exists() else {}
        numbers = " ".join(layer.digest for layer in report.layers)
        if numbers not in known:
            known[numbers] = perplexity(open_network(folder, torch.bfloat16), self._windows)
            self._known.write_text(json.dumps(known))
        programs = [
            name
            for name in dashq.load_registry().programs.get(open_checkpoint(folder).serializer.name, {})
            if name in self._programs
        ]
        return {
            "perplexity": known[numbers],
            "bits_per_weight": report.totals.bits_per_weight,
            "bytes_on_disk": report.totals.bytes_on_disk,
            "mean_error": report.totals.mean_error,
            "solve_seconds": report.seconds["solve"],
            "verified": {name: verify(folder, name, self._programs[name]) for name in programs},
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
