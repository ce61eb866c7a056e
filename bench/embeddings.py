"""SmolLM2 with its one matrix for embeddings and head quantized too: perplexity against the bytes of the whole file.

Blocks do not depend on what is done with that matrix, which is solved behind them: a `dashq run` without it is made
once, and each entry of `embeddings` in a recipe is then solved and judged as a run would. What stands in the file of
results already is not measured again.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from bench.robustness import Figures, complete, quantize
from dashq import TextSource, load_registry
from dashq.calibration.outside import observe_outside
from dashq.calibration.shell import Shell
from dashq.calibration.stream import Stream
from dashq.calibration.tokens import draw, evaluation_windows
from dashq.measuring.evaluate import perplexity
from dashq.model.outside import parameter_count
from dashq.quantizing.layer import quantize_layer
from dashq.quantizing.opening import open_model, plan_model
from dashq.recipe.recipe import Recipe
from dashq.results.checkpoint import open_checkpoint, open_network
from dashq.results.convert import recipe_of
from dashq.results.report import read_report

REGISTRY = load_registry()
ENTRIES = (
    "",
    "{bits: 3, grouper: {name: contiguous, size: 64}}",
    "{bits: 4, grouper: {name: contiguous, size: 64}}",
    "{bits: 5, grouper: {name: contiguous, size: 192}}",
    "{bits: 6, grouper: {name: contiguous, size: 192}}",
)


def main() -> None:
    """Measure every entry behind every start, printing and keeping each line when it is there."""
    parser = argparse.ArgumentParser(prog="python -m bench embeddings", description=__doc__)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", nargs="+", default=["pydoc=pydoc"], help="texts to judge on, each as NAME=SOURCE")
    parser.add_argument("--method", default="hybrid", help="of the blocks, as in `python -m bench robustness`")
    parser.add_argument("--bits", type=int, default=2, help="of the blocks")
    parser.add_argument("--entries", nargs="+", default=ENTRIES, help="of `embeddings`, in YAML; '' leaves them")
    parser.add_argument("--samples", type=int, default=16, help="to calibrate on")
    parser.add_argument("--tokens", type=int, default=512, help="in each of them")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration")
    parser.add_argument("--windows", type=int, nargs="+", default=[20, 8], help="of each test text, the first ones")
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 1024], help="tokens in these windows")
    parser.add_argument("--start", type=Path, help="a result with the blocks, made there where it is none yet")
    parser.add_argument("--output", type=Path, default=Path("bench/results/embeddings.jsonl"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments.start = arguments.start or Path(folder) / "start"
        requests = [(wanted(entry, arguments), partial(measure, entry, arguments)) for entry in arguments.entries]
        complete(arguments.output, requests)


def wanted(entry: str, arguments: argparse.Namespace) -> Figures:
    """What makes a result what it is."""
    return {
        "method": arguments.method,
        "bits": arguments.bits,
        "embeddings": yaml.safe_load(entry) if entry else None,
        "samples": arguments.samples,
        "sequence_length": arguments.tokens,
        "seed": arguments.seed,
        "windows": arguments.windows[: len(arguments.test)],
        "context": arguments.context[: len(arguments.test)],
    }


@torch.no_grad()
def measure(entry: str, arguments: argparse.Namespace) -> Figures:
    """Solve the embeddings behind the blocks, put them into the opened result, and judge it on every text."""
    start = arguments.start
    if not (start / "report.json").exists():
        quantize(arguments.method, wanted("", arguments), arguments, start)
    checkpoint, report = open_checkpoint(start), read_report(start)
    network: Any = open_network(start, torch.float32).dequantize()
    figures: Figures = {}
    size = report.totals.bytes_on_disk
    if entry:
        settings = recipe_of(checkpoint, REGISTRY).model_dump(mode="json")
        recipe = Recipe.model_validate({**settings, "embeddings": yaml.safe_load(entry)}, context=REGISTRY)
        model = open_model(recipe)
        (plan,) = (plan for plan in plan_model(recipe, model) if plan.layer.role == "tied")
        tokens = draw(recipe.calibration, model.tokenizer).samples
        stream = Stream(model, tokens)
        for block in model.walk():
            for name in checkpoint.layers:
                if name.startswith(f"{block.name}."):
                    block.replace_weight(name, checkpoint.quantized(name).dequantize())
            stream.advance(block)
        with model.outside(head=True) as outside:
            (observation,) = observe_outside(model, Shell(model), [plan], tokens, stream).values()
            weight = outside[f"{plan.layer.name}.weight"]
            quantized, solved = quantize_layer(plan, weight.float(), observation)
        network.get_input_embeddings().weight.data.copy_(quantized.dequantize())
        size += solved.bytes - weight.nbytes
        figures = {"error": solved.error, "minmax_error": solved.minmax_error, "solve_seconds": solved.seconds}
    parameters = parameter_count(network)
    figures |= {"bytes_on_disk": size, "bits_per_parameter": 8 * size / parameters}
    perplexities = {}
    for test, windows, context in zip(arguments.test, arguments.windows, arguments.context, strict=False):
        name, _, source = test.partition("=")
        text = TextSource(name=source, split="test" if source == "pydoc" else "train")
        tokenizer = open_model(recipe_of(checkpoint, REGISTRY)).tokenizer
        perplexities[name] = perplexity(network, evaluation_windows(text, tokenizer, context, windows))
    return figures | {"perplexity": perplexities}


if __name__ == "__main__":
    main()
