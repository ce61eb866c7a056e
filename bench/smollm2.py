"""SmolLM2-135M-Instruct at 2, 3 and 4 bits, group 64: perplexity, bits per weight, weighted error.

One-shot calibration on 16 × 2048 tokens, perplexity over windows of 2048 tokens, spread evenly over the text. One walk
over the blocks serves all configurations, since with `propagate: original` they all see the same inputs; each solves
every layer as `dashq run` would, and is judged with its dequantized weights.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import dashq
from dashq.data import Zero
from dashq.evaluate import load_model, perplexity
from dashq.model import linear_weight
from dashq.pipeline import observe_block, open_model, quantize_layer
from dashq.report import LayerReport
from dashq.stream import Stream
from dashq.tokens import TextSource, calibration_tokens, evaluation_windows

RECIPE = Path("recipes/smollm2_2bit.yaml")
SOLVERS = {"closed_form": "closed_form", "paper": "{name: irls, preset: paper}", "rtn": "rtn", "irls": "irls"}
# Solver, bits, kind of zero. The native format stores real zeros; the others are judged as if a format held them.
SCHEMES: dict[str, tuple[str, int, Zero]] = {
    **{f"{label}-{bits}": (solver, bits, "real") for bits in (2, 3, 4) for label, solver in SOLVERS.items()},
    "closed_form-2-integer": ("closed_form", 2, "integer"),
    "closed_form-2-symmetric": ("closed_form", 2, "symmetric"),
}


def main() -> None:
    """Quantize with every scheme in one walk, then judge one after the other, printing each figure when it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench smollm2", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", default="pydoc", help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=20, help="how many to judge on, spread evenly over the text")
    parser.add_argument("--only", nargs="*", default=["original", *SCHEMES], help="which to judge, in this order")
    arguments = parser.parse_args()
    schemes = [name for name in arguments.only if name in SCHEMES]
    weights, reports = quantize_all(arguments.model, arguments.calibration, schemes)
    loaded = load_model(arguments.model)
    original = {name: tensor.clone() for name, tensor in loaded.network.state_dict().items()}
    windows = evaluation_windows(TextSource(name=arguments.test, split="test"), loaded.tokenizer, 2048, None)
    pieces = spread(windows, arguments.windows)
    for name in arguments.only:
        loaded.network.load_state_dict(original)
        loaded.network.load_state_dict(weights[name], strict=False)
        print(json.dumps(figures(name, perplexity(loaded.network, pieces), reports[name])), flush=True)


@torch.no_grad()
def quantize_all(
    model_name: str, calibration: str, schemes: list[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[LayerReport]]]:
    """The dequantized weights and the reports of every scheme."""
    registry = dashq.load_registry()
    settings = [f"model={model_name}", f"calibration.dataset={calibration}"]
    settings += [
        "calibration.samples=16",
        "calibration.tokens=2048",
        "scheme.estimator=diagonal",
        "calibration.propagate=original",
    ]
    recipes = {
        name: dashq.load_recipe(
            RECIPE, registry, [*settings, f"scheme.solver={SCHEMES[name][0]}", f"scheme.bits={SCHEMES[name][1]}"]
        )
        for name in schemes
    }
    first = dashq.load_recipe(RECIPE, registry, settings)
    model = open_model(first)
    text = first.calibration
    tokens = calibration_tokens(text.dataset, model.tokenizer(), text.samples, text.tokens, text.seed, text.packing)
    with model.outside():
        stream = Stream(model, tokens)
    plans = {
        name: [
            replace(plan, grid=replace(plan.grid, zero=SCHEMES[name][2]))
            for plan in dashq.make_plan(recipe, model.layers())
        ]
        for name, recipe in recipes.items()
    }
    weights: dict[str, dict[str, Tensor]] = defaultdict(dict)
    reports: dict[str, list[LayerReport]] = defaultdict(list)
    for index, block_name in enumerate(model.blocks):
        with model.block(index) as block:
            mine = {
                name: [p for p in all_plans if p.layer.name.startswith(f"{block_name}.")]
                for name, all_plans in plans.items()
            }
            observations = observe_block(block, next(iter(mine.values())), stream, index, one_pass=True)
            for name, block_plans in mine.items():
                for plan in block_plans:
                    key = f"{plan.layer.name}.weight"
                    weight = linear_weight(block.linears[plan.layer.name], block.tensors[key]).float()
                    quantized, report = quantize_layer(plan, weight, observations[plan.layer.name])
                    weights[name][key] = quantized.dequantize().half()
                    reports[name].append(report)
    return weights, reports


def spread(windows: Tensor, count: int) -> Tensor:
    """At most `count` of the windows, the same distance apart."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long()]


def figures(name: str, measured: float, reports: list[LayerReport]) -> dict[str, object]:
    """One row of the table."""
    bits_per_weight = 16.0
    if reports:  # codes, a float16 scale, and the zero
        _, bits, zero = SCHEMES[name]
        bits_per_weight = bits + (16 + {"real": 16, "integer": bits, "symmetric": 0}[zero]) / reports[0].group_size
    return {
        "name": name,
        "perplexity": measured,
        "bits_per_weight": bits_per_weight,
        "mean_error": sum(report.error for report in reports) / len(reports) if reports else 0.0,
        "solve_seconds": sum(report.seconds for report in reports),
    }
