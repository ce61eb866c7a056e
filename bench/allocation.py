"""Whether choosing by measurement pays: perplexity at equal bits, SmolLM2-135M-Instruct, one line for each model.

One walk on 16 × 512 tokens solves every layer at 2, 3 and 4 bits in each group size. From these are put together:
uniform models, models within the same budget of bits, and models with a share of the weights at 4 bits, chosen by each
measure and at random. Each is judged on the first windows of the test text; its divergence from the original, in nats
per token, is of the first window. `expected` is the sum of the layers' sensitivities.
"""

import argparse
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import dashq
from bench._record import result_line
from dashq.calibration.tokens import evaluation_windows
from dashq.data import Quantized
from dashq.measuring.analysis import Analysis
from dashq.measuring.choosing import choices_for, settle
from dashq.measuring.evaluate import load_model, perplexity
from dashq.measuring.sensitivity import analyze
from dashq.model.decoder import Model
from dashq.quantizing.opening import open_model
from dashq.recipe.plan import LayerPlan
from dashq.text_source import TextSource
from dashq_cli import charts

RECIPE = Path("recipes/smollm2_2bit.yaml")
# Bits per weight, and the uniform model, in bits and columns of a group, that takes as many.
BUDGETS = {2.5: (2, 64), 3.0: (2, 32), 3.5: (3, 64)}
SHARE = 0.1
SEEDS = (0, 1, 2)


def main() -> None:
    """Walk, or take what an earlier walk left in the folder; then judge one model after the other."""
    parser = argparse.ArgumentParser(prog="python -m bench allocation", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", default="pydoc", help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=8, help="how many windows of 2048 tokens, the first ones")
    parser.add_argument("--estimator", default="diagonal")
    parser.add_argument("--solver", default="closed_form")
    parser.add_argument("--groups", type=int, nargs="*", default=[32, 64, 192])
    parser.add_argument("--folder", type=Path, default=Path("out/allocation"), help="for the analysis and the layers")
    parser.add_argument("--only", nargs="*", help="which models to judge, by their names")
    parser.add_argument("--figures", type=Path, help="only draw what was measured, into this folder")
    arguments = parser.parse_args()
    settings = [
        f"model={arguments.model}",
        f"output={arguments.folder}",
        f"calibration={{dataset: {arguments.calibration}, samples: 16, sequence_length: 512}}",
        f"scheme.estimator={arguments.estimator}",
        f"scheme.solver={arguments.solver}",
        "scheme.grouper={name: contiguous, size: 64}",
    ]
    groupers = f"[{', '.join(f'{{name: contiguous, size: {size}}}' for size in arguments.groups)}]"
    offered = f"bits: [2, 3, 4], groupers: {groupers}"
    recipe = build([*settings, f"budget={{bits_per_weight: 9, {offered}}}"])
    model = open_model(recipe)
    analysis = Analysis.load(arguments.folder) or walk(recipe, model)
    if arguments.figures:
        draw(analysis, arguments.figures)
        return
    fixed = {"estimator": arguments.estimator, "solver": arguments.solver, "analysis_seconds": round(analysis.seconds)}
    judge = Judge(arguments.model, arguments.test, arguments.windows, arguments.folder)
    for name, plans in models(settings, offered, arguments.groups, model, analysis):
        if not arguments.only or name in arguments.only:
            print(result_line({"name": name, **fixed, **figures(plans, analysis), **judge(plans)}), flush=True)


def draw(analysis: Analysis, folder: Path) -> None:
    """The map of sensitivities, and the signal-to-noise in the first and a middle block."""
    some = [layer for layer in analysis.layers if layer.name.startswith(("model.layers.0.", "model.layers.15."))]
    charts.save(charts.sensitivity(analysis.layers), folder / "sensitivity.svg")
    charts.save(charts.noise(some), folder / "snr.svg")


def build(settings: list[str]) -> dashq.Recipe:
    """The demo's recipe with other settings, for the blocks alone."""
    return dashq.load_recipe(RECIPE, dashq.load_registry(), ["embeddings=null", *settings])


def walk(recipe: dashq.Recipe, model: Model) -> Analysis:
    """Solve every layer in every way; leave the analysis and the weights in the recipe's output."""
    weights: dict[str, Tensor] = {}

    def keep(plan: LayerPlan, quantized: Quantized) -> None:
        weights[f"{plan.layer.name} {plan.scheme.bits} {plan.size}"] = quantized.dequantize(torch.float16)

    recipe.output.mkdir(parents=True, exist_ok=True)
    analysis = analyze(recipe, model, choices_for(recipe, model), keep=keep)
    save_file(weights, recipe.output / "layers.safetensors")
    analysis.save(recipe.output)
    return analysis


def models(
    settings: list[str], offered: str, groups: list[int], model: Model, analysis: Analysis
) -> Iterator[tuple[str, list[LayerPlan]]]:
    """What there is to judge: a name, and the plans of all layers; the original has none."""
    layers = model.layers()

    def plans(*more: str) -> list[LayerPlan]:
        recipe, _ = settle(build([*settings, *more]), model, analysis)
        return list(dashq.make_plan(recipe, layers))

    yield "original", []
    for budget, (bits, size) in BUDGETS.items():
        if size in groups:
            yield f"uniform {bits}/{size}", plans(f"scheme.bits={bits}", f"scheme.grouper.size={size}")
        yield f"budget {budget}", plans(f"budget={{bits_per_weight: {budget}, {offered}}}")
    for by in ("sensitivity", "error", "snr"):
        yield f"critical {by}", plans(f"overrides=[{{critical: {{share: {SHARE}, by: {by}}}, bits: 4}}]")
    for budget in BUDGETS:  # the weights of this model come from a grid of 4 bits, on which they lose little
        yield (
            f"budget {budget} of 2 and 3 bits",
            plans(f"budget={{bits_per_weight: {budget}, {offered.replace('2, 3, 4', '2, 3')}}}"),
        )
    plain, better = plans(), {plan.layer.name: plan for plan in plans("scheme.bits=4")}
    for seed in SEEDS:
        yield f"critical random {seed}", at_random(plain, better, seed)


def at_random(plain: list[LayerPlan], better: Mapping[str, LayerPlan], seed: int) -> list[LayerPlan]:
    """The share of the weights that random layers hold as the better ones, the others plain."""
    room = SHARE * sum(plan.layer.weights for plan in plain)
    chosen = set()
    for plan in random.Random(seed).sample(plain, len(plain)):
        if (weights := plan.layer.weights) <= room:
            chosen.add(plan.layer.name)
            room -= weights
    return [better[plan.layer.name] if plan.layer.name in chosen else plan for plan in plain]


def figures(plans: list[LayerPlan], analysis: Analysis) -> dict[str, object]:
    """Size and what the analysis expects of a model."""
    if not plans:
        return {"bits_per_weight": 16.0, "expected": 0.0}
    weights = sum(plan.layer.weights for plan in plans)
    choices = [analysis.by_name[plan.layer.name].choice(plan) for plan in plans]
    return {
        "bits_per_weight": round(8 * sum(plan.bytes for plan in plans) / weights, 4),
        "expected": round(sum(choice.sensitivity for choice in choices if choice), 4),
    }


class Judge:
    """Puts layers into the original model and measures it."""

    def __init__(self, model: str, test: str, windows: int, folder: Path) -> None:
        self._loaded = load_model(model)
        self._original = {name: tensor.clone() for name, tensor in self._loaded.network.state_dict().items()}
        self._windows = evaluation_windows(TextSource(name=test, split="test"), self._loaded.tokenizer, 2048, windows)
        self._layers = safe_open(folder / "layers.safetensors", framework="pt")
        self._expected = self._predictions()

    def __call__(self, plans: list[LayerPlan]) -> dict[str, float]:
        network = self._loaded.network
        network.load_state_dict(self._original)
        for plan in plans:
            weight = self._layers.get_tensor(f"{plan.layer.name} {plan.scheme.bits} {plan.size}")
            network.get_parameter(f"{plan.layer.name}.weight").data.copy_(weight)
        lost = (self._expected.exp() * (self._expected - self._predictions())).sum(-1).mean()
        return {"divergence": round(float(lost), 4), "perplexity": round(perplexity(network, self._windows), 2)}

    @torch.inference_mode()
    def _predictions(self) -> Tensor:
        logits: Tensor = self._loaded.network(self._windows[:1], use_cache=False).logits
        return logits[0].float().log_softmax(-1)


if __name__ == "__main__":
    main()
