"""How far each solver stays above the global optimum on real layers, with importances from a real calibration.

One walk over the model with calibration text. In each layer a random sample of groups is compared with the exact
optimum of its weighted error; a layer's excess is that of the sums over its sample.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import dashq
from bench._record import result_line
from dashq import Curvature, Grid, Grouping, load_registry
from dashq.calibration.observe import observe_block
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw
from dashq.data import Zero
from dashq.quantizing.opening import open_model
from dashq.results.report import overall
from dashq.solving.certificate import Certificate, certify

SOLVERS: Mapping[str, Mapping[str, object]] = {
    "rtn": {},
    "irls, paper settings": {"preset": "paper"},
    "irls": {},
    "closed_form": {},
}
# Bits, group size, kind of zero: 576 columns are not divided by 128, but by 96 and 192.
GRIDS: tuple[tuple[int, int, Zero], ...] = (
    *((2, size, "real") for size in (32, 64, 96, 192)),
    (3, 64, "real"),
    (2, 64, "integer"),
    (2, 64, "symmetric"),
    (3, 64, "integer"),
    (4, 64, "integer"),
)
MOST_EVENTS = 4 << 20


def main() -> None:
    """Print one line for each solver and grid."""
    parser = argparse.ArgumentParser(prog="python -m bench optimality", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--samples", type=int, default=4, help="of 1024 tokens")
    parser.add_argument("--every", type=int, default=5, help="take every so many blocks")
    parser.add_argument("--groups", type=int, default=64, help="to compare in each layer")
    arguments = parser.parse_args()
    certificates: dict[tuple[int, int, Zero, str], list[Certificate]] = defaultdict(list)
    layers = observed(arguments.model, arguments.calibration, arguments.samples, arguments.every)
    for name, (weight, curvature) in layers.items():
        for bits, size, zero in GRIDS:
            if weight.shape[1] % size:
                continue
            grid, grouping = (
                Grid(bits=bits, dtype=torch.float16, zero=zero),
                Grouping(columns=weight.shape[1], size=size),
            )
            for label, fields in SOLVERS.items():
                solver = load_registry().solvers[label.split(",")[0]].model_validate(fields)
                quantized = solver.solve(weight, curvature, grouping, grid)
                found = certify(name, weight, quantized, curvature, arguments.groups, MOST_EVENTS)
                if found:
                    certificates[bits, size, zero, label].append(found)
    for (bits, size, zero, label), found_in in certificates.items():
        place = {"bits": bits, "group": size, "zero": zero, "solver": label, "layers": len(found_in)}
        print(result_line({**place, **(asdict(gaps) if (gaps := overall(found_in)) else {})}), flush=True)


@torch.no_grad()
def observed(name: str, calibration: str, samples: int, every: int) -> dict[str, tuple[Tensor, Curvature]]:
    """The weights of every `every`-th block's layers, and what the layers see."""
    settings = [f"model={name}", f"calibration.dataset={calibration}", f"calibration.samples={samples}"]
    settings += ["calibration.sequence_length=1024", "calibration.propagate=original"]
    settings += ["scheme.estimator=diagonal", "scheme.solver=closed_form", "embeddings=null"]
    recipe = dashq.load_recipe(Path("recipes/smollm2_2bit.yaml"), load_registry(), settings)
    model = open_model(recipe)
    stream = Stream(model, draw(recipe.calibration, model.tokenizer).samples)
    plans = dashq.make_plan(recipe, model.layers())
    layers: dict[str, tuple[Tensor, Curvature]] = {}
    for block in model.walk():
        own_plans = [plan for plan in plans if plan.layer.block == block.name]
        observations = observe_block(block, own_plans, stream, one_pass=True)
        for plan in own_plans if block.index % every == 0 else ():
            layer = plan.layer.name
            layers[layer] = block.weight(layer).float(), observations[layer].curvature
    return layers
