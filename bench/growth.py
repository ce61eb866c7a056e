"""How seconds and memory grow: to open, plan and read more and more tiny blocks; or, with `--runs`, of whole runs.

A run is `dashq run` on a random model, against its depth, its width, its experts and the tokens of its text. Seconds
are the processor's, beyond those of importing dashq, and so is the peak of memory.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from bench._record import result_line
from bench.memory import usage
from dashq import load_recipe, load_registry
from dashq.quantizing.opening import open_model, plan_model
from dashq.results.report import read_report

RECIPE = Path("recipes/smollm2_2bit.yaml")
SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
# What grows, and its values; all else is as in `RUN`.
AXES: Mapping[str, Sequence[int]] = {
    "blocks": (4, 8, 16, 32),
    "width": (256, 512, 1024, 2048),
    "experts": (4, 8, 16, 32),
    "tokens": (4096, 8192, 16384, 32768),
}
RUN = {"blocks": 4, "width": 256, "experts": 0, "tokens": 2048}
SAMPLE = 256  # tokens


def main() -> None:
    """Print one line of JSON for each number of blocks, or for each run."""
    parser = argparse.ArgumentParser(prog="python -m bench growth", description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="*", default=[100, 200, 400, 800])
    parser.add_argument("--tokenizer", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="Its folder.")
    parser.add_argument("--note", default="", help="Words that tell this line from others, as `before`.")
    parser.add_argument("--runs", nargs="*", choices=AXES, help="What grows in runs; without names, all.")
    arguments = parser.parse_args()
    if arguments.runs is not None:
        for axis in arguments.runs or AXES:
            for value in AXES[axis]:
                figures = {"axis": axis, "note": arguments.note} | run({**RUN, axis: value}, arguments.tokenizer)
                print(result_line(figures), flush=True)
        return
    for count in arguments.blocks:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "model", count, arguments.tokenizer)
            figures = {"blocks": count, "note": arguments.note} | seconds(Path(folder))
        print(result_line(figures), flush=True)


def run(sizes: Mapping[str, int], tokenizer: Path) -> dict[str, Any]:
    """The figures of a run on a model of these sizes."""
    width, experts = sizes["width"], sizes["experts"]
    shape: dict[str, Any] = {
        "vocab_size": 49152,
        "hidden_size": width,
        "intermediate_size": width if experts else 3 * width,
        "num_hidden_layers": sizes["blocks"],
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64,
        "tie_word_embeddings": True,
    }
    config = MixtralConfig(**shape, num_local_experts=experts) if experts else LlamaConfig(**shape)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
        for path in tokenizer.glob("*token*"):
            (folder / "model" / path.name).symlink_to(path.absolute())
        scheme: dict[str, Any] = {"bits": 2, "estimator": "diagonal", "solver": "closed_form", "router": "routed"}
        scheme |= {"grouper": {"name": "contiguous", "size": 64}}
        text = {"dataset": "pydoc", "samples": sizes["tokens"] // SAMPLE, "sequence_length": SAMPLE}
        settings: dict[str, Any] = {"model": str(folder / "model"), "output": str(folder / "out"), "calibration": text}
        settings |= {"scheme": scheme, "serializer": "dashq", "certificate_groups": 0, "dtype": "float32"}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
        idle, started = usage([sys.executable, "-c", "import dashq; dashq.load_registry()"])
        command = [str(Path(sys.executable).with_name("dashq")), "run", str(folder / "recipe.yaml"), "--quiet"]
        peak, seconds = usage(command)
        weights = read_report(folder / "out").totals.weights
    return {
        **sizes,
        "weights": weights,
        "cpu_seconds": round(seconds - started, 2),
        "bytes": peak - idle,
    }


def write_model(folder: Path, blocks: int, tokenizer: Path) -> None:
    """A model of tiny blocks, with another's tokenizer."""
    config = LlamaConfig(num_hidden_layers=blocks, vocab_size=49152, tie_word_embeddings=True, **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in tokenizer.glob("*token*"):
        (folder / path.name).symlink_to(path.absolute())


def seconds(folder: Path) -> dict[str, float]:
    """CPU seconds to open the model, to plan it, and to read every block."""
    settings = yaml.safe_load(RECIPE.read_text()) | {"model": str(folder / "model"), "output": str(folder / "out")}
    del settings["embeddings"]
    settings["scheme"]["grouper"] = {"name": "contiguous", "size": 16}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    recipe = load_recipe(folder / "recipe.yaml", load_registry())
    start = time.process_time()
    model = open_model(recipe)
    opened = time.process_time()
    plan_model(recipe, model)
    planned = time.process_time()
    for _ in model.walk():
        pass
    read = time.process_time()
    return {
        "open_seconds": round(opened - start, 2),
        "plan_seconds": round(planned - opened, 2),
        "read_seconds": round(read - planned, 2),
    }


if __name__ == "__main__":
    main()
