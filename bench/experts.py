"""The trained mixture at 2 and 3 bits: perplexity by router plugin, pooling, group size and calibration samples.

Only experts are quantized, so that nothing else blurs the comparison. One walk serves a whole table: with `propagate:
original` every configuration sees the same inputs. Calibration is on the training half of Python's help topics,
perplexity on the held-out ones; told is the geometric mean over several draws of the calibration text.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dashq
from bench._record import result_line
from bench.mixture import CONTEXT, FOLDER
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw, evaluation_windows
from dashq.measuring.evaluate import load_model, perplexity
from dashq.quantizing.layer import quantize_layer
from dashq.quantizing.opening import open_model
from dashq.recipe.plan import LayerPlan
from dashq.text_source import TextSource

ROUTERS = ("routed", "gated", "{name: gated, power: 2}", "blended", "every_expert")
POOLINGS = (0, 64, 256)


def main() -> None:
    """Print one line of JSON for each configuration, when it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench experts", description=__doc__)
    parser.add_argument("--samples", type=int, nargs="*", default=[2, 8, 64])
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--sizes", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--seeds", type=int, default=3, help="draws of the calibration text, of which the mean is told")
    arguments = parser.parse_args()
    loaded = load_model(str(FOLDER), dtype="float32")
    windows = evaluation_windows(TextSource(name="pydoc", split="test"), loaded.tokenizer, CONTEXT, None)
    original = {name: tensor.clone() for name, tensor in loaded.network.state_dict().items()}
    print(result_line({"name": "original", "perplexity": perplexity(loaded.network, windows)}), flush=True)
    for samples in arguments.samples:
        found: dict[str, list[float]] = defaultdict(list)
        for seed in range(arguments.seeds):
            schemes = _schemes(arguments.bits, arguments.sizes, rtn=samples == arguments.samples[0] and seed == 0)
            for name, weights in quantize_all(schemes, samples, seed).items():
                loaded.network.load_state_dict(original | weights)
                found[name].append(perplexity(loaded.network, windows))
        for name, values in found.items():
            mean = float(torch.tensor(values).log().mean().exp())
            print(
                result_line({"samples": samples, **json.loads(name), "perplexity": mean, "draws": values}), flush=True
            )


def _schemes(bits: list[int], sizes: list[int], rtn: bool) -> dict[str, dict[str, Any]]:
    schemes = {}
    for b in bits:
        for size in sizes:
            common = {"bits": b, "group": size}
            if rtn:
                schemes[json.dumps(common | {"solver": "rtn"})] = {"router": "routed", "solver": "rtn", **common}
            for router in ROUTERS:
                # To the pooled estimate every token is sent to every expert: there is nothing to shrink.
                for pooling in POOLINGS if router != "every_expert" else (0,):
                    key = common | {"solver": "closed_form", "router": router, "pooling": pooling}
                    schemes[json.dumps(key)] = key
    return schemes


@torch.no_grad()
def quantize_all(schemes: dict[str, dict[str, Any]], samples: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """The stacks of experts as every scheme leaves them, by scheme and parameter."""
    registry = dashq.load_registry()

    def recipe(scheme: dict[str, Any]) -> dashq.Recipe:
        settings = {f"scheme.{key}": scheme[key] for key in ("bits", "router", "solver", "pooling") if key in scheme}
        settings |= {"scheme.grouper.size": scheme["group"], "model": FOLDER, "calibration.seed": seed}
        settings |= {"calibration.samples": samples, "calibration.sequence_length": CONTEXT, "dtype": "float32"}
        settings |= {"overrides": "[{match: '.*self_attn.*', skip: true}]", "embeddings": "null"}
        listed = [f"{key}={value}" for key, value in settings.items()]
        return dashq.load_recipe(Path("recipes/smollm2_2bit.yaml"), registry, listed)

    recipes = {name: recipe(scheme) for name, scheme in schemes.items()}
    first = next(iter(recipes.values()))
    model = open_model(first)
    stream = Stream(model, draw(first.calibration, model.tokenizer).samples)
    plans = {name: dashq.make_plan(recipe, model.layers()) for name, recipe in recipes.items()}
    weights: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for block in model.walk():
        observed: dict[str, Any] = {}
        for name, every in plans.items():
            own_plans: list[LayerPlan] = [plan for plan in every if plan.layer.block == block.name]
            # What is seen depends on router and pooling alone.
            key = json.dumps([schemes[name].get("router"), schemes[name].get("pooling")])
            if key not in observed:
                observed[key] = observe_block(block, own_plans, stream, one_pass=False)
            stacks: dict[str, list[Tensor]] = defaultdict(list)
            for plan in own_plans:
                layer = plan.layer.name
                quantized, _ = quantize_layer(plan, block.weight(layer).float(), observed[key][layer])
                stacks[layer.rpartition(".")[0]].append(quantized.dequantize())
            weights[name] |= {stack: torch.stack(matrices) for stack, matrices in stacks.items()}
        stream.advance(block)
    return weights


if __name__ == "__main__":
    main()
