"""What other programs reach on one model, beside dashq on equal terms: perplexity, bits per weight, time, memory.

Each quantizes every linear layer of every block on the same tokens, in a process of its own, on as many threads as
this one; seconds and peak are those of the whole process. Then the weights that its codes stand for are put into the
original model and judged, all by the same code. Codes, a float16 scale and the zero of each group are counted: a
float16 number where it is real, a code where it is whole. Programs keep their defaults but for what is asked for and
for whole zeros; they compute in float32, and the scales behind their weights are not rounded to float16. dashq's are.

Each program is installed, in a pinned version, in an environment of its own. One that cannot be installed or run gets
a line that says why. What stands in the file of results already is not measured again.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench._environments import PROGRAMS, Unavailable, installed
from bench.memory import _peak
from bench.robustness import Figures, complete, judge, quantize
from bench.smollm2 import stored_bits
from dashq.calibration.tokens import draw
from dashq.data import Zero
from dashq.measuring.evaluate import Loaded, load_model
from dashq.recipe.recipe import Calibration
from dashq.results.checkpoint import open_checkpoint
from dashq.text_source import TextSource

Weights = dict[str, Tensor]

PEERS = {
    "llm-compressor-gptq": "llm-compressor",
    "llm-compressor-awq": "llm-compressor",
    "gptqmodel": "gptqmodel",
    "auto-round": "auto-round",
    "hqq": "hqq",
}
# Of `bench.robustness`, and the format that holds whole zeros.
OURS = ("closed_form", "hybrid_sequential", "hybrid")
SERIALIZERS: dict[Zero, str] = {"real": "dashq", "integer": "{name: compressed-tensors, zero: integer}"}


def main() -> None:
    """Measure every method at every number of bits."""
    arguments = parse()
    complete(
        arguments.output,
        (
            (asked, partial(measure, asked, arguments))
            for bits in arguments.bits
            for method in arguments.methods
            for zero in (("real", "integer") if method in OURS else ("real" if method == "hqq" else "integer",))
            for asked in [wanted(method, bits, zero, arguments)]
        ),
    )


def parse() -> argparse.Namespace:
    """The options."""
    summary, _, explanation = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m bench peers", description=summary, epilog=explanation)
    methods = ["original", *OURS, *PEERS]
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--test", nargs="+", default=["pydoc=pydoc"], help="texts to judge on, each as NAME=SOURCE")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods, metavar="NAME", help=str(methods))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round, for each block")
    for option, default in {
        "group": 64,
        "samples": 16,
        "tokens": 512,
        "seed": 0,
        "windows": 20,
        "context": 2048,
    }.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--environments", type=Path, default=Path("out/environments"), help="where programs are")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write each result there, as a plain model")
    parser.add_argument("--output", type=Path, default=Path("bench/results/peers.jsonl"))
    return parser.parse_args()


def wanted(method: str, bits: int, zero: Zero, arguments: argparse.Namespace) -> Figures:
    """What makes a result what it is; HQQ uses no text."""
    asked: Figures = {"method": method, "windows": arguments.windows, "context": arguments.context}
    if method == "original":
        return asked
    asked |= {"bits": bits, "group": arguments.group, "zero": zero}
    if method in PEERS:
        asked |= {"version": next(word for word in PROGRAMS[PEERS[method]][0] if "==" in word)}
    if method == "auto-round":
        asked |= {"iterations": arguments.iterations}
    if method == "hqq":
        return asked
    return asked | {"samples": arguments.samples, "tokens": arguments.tokens, "seed": arguments.seed}


def measure(asked: Figures, arguments: argparse.Namespace) -> Figures:
    """Quantize, and judge on every text."""
    loaded = load_model(arguments.model)
    if asked["method"] == "original":
        return {"bits_per_weight": 16.0, "perplexity": judge(loaded, arguments)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            weights, figures = (theirs if asked["method"] in PEERS else ours)(asked, arguments, loaded, Path(folder))
        except Unavailable as reason:
            return {"unavailable": str(reason)}
    put(weights, asked, loaded)
    if arguments.keep:
        name = f"{asked['method']}-{asked['bits']}bit-{asked['zero']}"
        for part in (loaded.network, loaded.tokenizer):
            part.save_pretrained(arguments.keep / name)
    return {
        "bits_per_weight": stored_bits(asked["bits"], asked["zero"], asked["group"]),
        "perplexity": judge(loaded, arguments),
        **figures,
        "threads": torch.get_num_threads(),
    }


def ours(asked: Figures, arguments: argparse.Namespace, loaded: Loaded, folder: Path) -> tuple[Weights, Figures]:
    """The weights that `dashq run` finds, with its seconds and peak."""
    grouper = f"{{name: contiguous, size: {asked['group']}}}"
    more = [f"serializer={SERIALIZERS[asked['zero']]}", f"scheme.grouper={grouper}"]
    before = processor_seconds()
    figures = quantize(asked["method"], asked, arguments, folder / "out", more)
    figures["processor_seconds"] = processor_seconds() - before
    checkpoint = open_checkpoint(folder / "out")
    weights = {f"{name}.weight": checkpoint.quantized(name).dequantize() for name in checkpoint.layers}
    return weights, {key: figures[key] for key in ("seconds", "processor_seconds", "peak_bytes")}


def theirs(asked: Figures, arguments: argparse.Namespace, loaded: Loaded, folder: Path) -> tuple[Weights, Figures]:
    """The weights that another program finds, with its seconds and peak."""
    program = PEERS[asked["method"]]
    python = installed(PROGRAMS[program], arguments.environments / program)
    text = Calibration(
        dataset=(TextSource(name=arguments.calibration),),
        samples=arguments.samples,
        sequence_length=arguments.tokens,
        seed=arguments.seed,
    )
    drawn = draw(text, loaded.tokenizer).samples
    tokens, result, log = folder / "tokens.safetensors", folder / "result.safetensors", folder / "log"
    save_file({"tokens": drawn}, tokens)
    options = {"bits": asked["bits"], "group": asked["group"], "iterations": arguments.iterations}
    settings = [f"--{key}={value}" for key, value in {**options, "threads": torch.get_num_threads()}.items()]
    files = [str(Path(file).absolute()) for file in (arguments.model, tokens, result)]
    command = [str(python), "-m", "bench._peer_worker", asked["method"], *files]
    start, before = time.perf_counter(), processor_seconds()
    try:
        with log.open("w") as lines:
            peak = _peak([*command, *settings], lines)
    except SystemExit as failure:
        said = log.read_text(errors="replace").strip().splitlines()
        raise Unavailable(said[-1] if said else str(failure)) from failure
    taken = {"seconds": time.perf_counter() - start, "processor_seconds": processor_seconds() - before}
    return load_file(result), {**taken, "peak_bytes": peak}


def processor_seconds() -> float:
    """What all processes that this one started and that ended have used, whatever else the machine did."""
    times = os.times()
    return times.children_user + times.children_system


def put(weights: Weights, asked: Figures, loaded: Loaded) -> None:
    """Put weights into the model; every layer has to be there, with no more than 2^bits values in any group."""
    network = loaded.network
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module is not network.get_output_embeddings():
            ordered = weights[f"{name}.weight"].unflatten(1, (-1, asked["group"])).sort(-1).values
            levels = 1 + int((ordered.diff(dim=-1) != 0).sum(-1).max())
            if levels > 2 ** asked["bits"]:
                raise ValueError(f"{name}: a group has {levels} values, which {asked['bits']} bits do not hold")
    if unknown := network.load_state_dict(weights, strict=False).unexpected_keys:
        raise ValueError(f"the model has no {unknown[0]}")


if __name__ == "__main__":
    main()
