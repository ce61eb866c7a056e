"""SmolLM2-135M-Instruct at 2, 3 and 4 bits, group 64: perplexity, bits per weight, weighted error.

One-shot calibration on 16 × 2048 tokens, perplexity over windows of 2048 tokens, spread evenly over the text. One walk
over the blocks serves all configurations, since with `propagate: original` they all see the same inputs; each solves
every layer as `dashq run` would, and is judged with its dequantized weights. With `--first` the first windows of both
texts are taken instead, without anything drawn at random.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dashq
from bench._record import result_line
from dashq.calibration.layers import Observation
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw, evaluation_windows
from dashq.data import Zero
from dashq.measuring.evaluate import load_model, perplexity
from dashq.model.decoder import Block
from dashq.quantizing.layer import quantize_layer
from dashq.quantizing.opening import open_model
from dashq.recipe.plan import LayerPlan
from dashq.results.report import LayerReport
from dashq.text_source import TextSource

RECIPE = Path("recipes/smollm2_2bit.yaml")
SAMPLES, TOKENS = 16, 2048
SOLVERS = {"closed_form": "closed_form", "paper": "{name: irls, preset: paper}", "rtn": "rtn", "irls": "irls"}


class Scheme(NamedTuple):
    """The native format stores real zeros; the other kinds are judged as if a format held them."""

    solver: str
    bits: int
    zero: Zero = "real"
    estimator: str = "diagonal"


SCHEMES = {
    **{f"{label}-{bits}": Scheme(solver, bits) for bits in (2, 3, 4) for label, solver in SOLVERS.items()},
    **{
        f"closed_form-{bits}-damped": Scheme("closed_form", bits, estimator="{name: diagonal, damping: 0.2}")
        for bits in (2, 3, 4)
    },
    "closed_form-2-integer": Scheme("closed_form", 2, "integer"),
    "closed_form-2-symmetric": Scheme("closed_form", 2, "symmetric"),
}


def main() -> None:
    """Quantize with every scheme in one walk, then judge one after the other, printing each figure when it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench smollm2", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", default="pydoc", help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=20, help="how many to judge on, spread evenly over the text")
    parser.add_argument("--first", action="store_true", help="take the first windows of both texts")
    parser.add_argument("--only", nargs="*", default=["original", *SCHEMES], help="which to judge, in this order")
    arguments = parser.parse_args()
    schemes = [name for name in arguments.only if name in SCHEMES]
    weights, reports = quantize_all(arguments.model, arguments.calibration, schemes, arguments.first)
    loaded = load_model(arguments.model)
    original = {name: tensor.clone() for name, tensor in loaded.network.state_dict().items()}
    windows = evaluation_windows(TextSource(name=arguments.test, split="test"), loaded.tokenizer, TOKENS, None)
    pieces = windows[: arguments.windows] if arguments.first else spread(windows, arguments.windows)
    for name in arguments.only:
        loaded.network.load_state_dict(original)
        loaded.network.load_state_dict(weights[name], strict=False)
        print(result_line(figures(name, perplexity(loaded.network, pieces), reports[name])), flush=True)


@torch.no_grad()
def quantize_all(
    model_name: str, calibration: str, schemes: list[str], first: bool
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[LayerReport]]]:
    """The dequantized weights and the reports of every scheme."""
    registry = dashq.load_registry()
    settings = [f"model={model_name}", f"calibration.dataset={calibration}", "calibration.propagate=original"]
    settings += ["embeddings=null"]
    recipes = {
        name: dashq.load_recipe(
            RECIPE,
            registry,
            [*settings, *(f"scheme.{key}={getattr(SCHEMES[name], key)}" for key in ("solver", "bits", "estimator"))],
        )
        for name in schemes
    }
    any_recipe = next(iter(recipes.values()))
    model = open_model(any_recipe)
    if first:
        tokens = evaluation_windows(any_recipe.calibration.dataset[0], model.tokenizer, TOKENS, SAMPLES)
    else:
        size = {"samples": SAMPLES, "sequence_length": TOKENS}
        tokens = draw(any_recipe.calibration.model_copy(update=size), model.tokenizer).samples
    stream = Stream(model, tokens)
    plans = {
        name: [
            replace(plan, grid=replace(plan.grid, zero=SCHEMES[name].zero))
            for plan in dashq.make_plan(recipe, model.layers())
        ]
        for name, recipe in recipes.items()
    }
    weights: dict[str, dict[str, Tensor]] = defaultdict(dict)
    reports: dict[str, list[LayerReport]] = defaultdict(list)
    for block in model.walk():
        for name, plan, observation in observe_all(block, plans, stream):
            quantized, report = quantize_layer(plan, block.weight(plan.layer.name).float(), observation)
            weights[name][f"{plan.layer.name}.weight"] = quantized.dequantize().half()
            reports[name].append(report)
    return weights, reports


def observe_all(
    block: Block, plans: dict[str, list[LayerPlan]], stream: Stream
) -> Iterator[tuple[str, LayerPlan, Observation]]:
    """Every plan for the block's layers with what its estimator saw: one pass for each estimator."""
    estimators = {SCHEMES[name].estimator: name for name in plans}
    seen = {}
    for number, (estimator, name) in enumerate(estimators.items(), start=1):
        own_plans = [plan for plan in plans[name] if plan.layer.block == block.name]
        seen[estimator] = observe_block(block, own_plans, stream, one_pass=number == len(estimators))
    for name, all_plans in plans.items():
        for plan in all_plans:
            if plan.layer.name in (observations := seen[SCHEMES[name].estimator]):
                yield name, plan, observations[plan.layer.name]


def spread(windows: Tensor, count: int) -> Tensor:
    """At most `count` of the windows, the same distance apart."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).round().long()]


def figures(name: str, measured: float, reports: list[LayerReport]) -> dict[str, object]:
    """One row of the table."""
    bits_per_weight = 16.0
    if reports:
        bits_per_weight = stored_bits(SCHEMES[name].bits, SCHEMES[name].zero, reports[0].group_size)
    return {
        "name": name,
        "perplexity": measured,
        "bits_per_weight": bits_per_weight,
        "mean_error": sum(report.error for report in reports) / len(reports) if reports else 0.0,
        "solve_seconds": sum(report.seconds for report in reports),
    }


def stored_bits(bits: int, zero: Zero, group: int) -> float:
    """Bits per weight of codes, a float16 scale for each group, and its zero: in float16, or a code."""
    return bits + (16 + {"real": 16, "integer": bits, "symmetric": 0}[zero]) / group
