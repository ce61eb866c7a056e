"""Seconds by phase of one random block of Llama-2-7B's shape, and the hours that a model of many such blocks takes.

A run on a small block comes first, so that what is compiled once is in no figure. Every layer is printed when it is
solved. Hours are those of calibrating, solving and writing: what is read and judged is little beside them. Beside the
seconds of each layer stands what one product of all its weights with all of H takes by itself.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import dashq
from bench._record import result_line
from bench.robustness import METHODS, RECIPE, settings_of
from dashq.results.events import Event, LayerDone
from dashq.results.report import read_report

SMALL: Mapping[str, Any] = {"hidden_size": 256, "intermediate_size": 512}  # large enough for compiled arithmetic
HEAD = 128  # columns of each attention head
PHASES = ("calibrate", "solve", "certify", "write")  # that each block has


def main() -> None:
    """Print the progress on stderr, then the figures as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench block", description=__doc__)
    parser.add_argument("--tokenizer", default="models/SmolLM2-135M-Instruct", help="a folder that has one")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--method", choices=METHODS, default="hybrid")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048, help="in each sample")
    parser.add_argument("--blocks", type=int, default=32, help="of the model whose hours are reckoned")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--note", default="", help="what else is to be known, as other work on the machine")
    arguments = parser.parse_args()
    shape = {"hidden_size": arguments.hidden, "intermediate_size": arguments.intermediate}
    measure(SMALL, arguments)
    seconds, layers = measure(shape, arguments)
    figures = {
        "method": arguments.method,
        "hidden": arguments.hidden,
        "intermediate": arguments.intermediate,
        "text": f"{Path(arguments.calibration).name}, {arguments.samples} x {arguments.tokens}",
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "layers": layers,
        "blocks": arguments.blocks,
        "hours": round(arguments.blocks * sum(seconds.get(phase, 0.0) for phase in PHASES) / 3600, 2),
    }
    print(result_line(figures | ({"note": arguments.note} if arguments.note else {})))


def measure(
    shape: Mapping[str, Any], arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Seconds by phase of a run on one random block of this shape, and of each layer beside those of a product."""
    start = time.perf_counter()

    def tell(words: str) -> None:
        print(f"{time.perf_counter() - start:8.1f} s  {words}", file=sys.stderr, flush=True)

    def listen(event: Event) -> None:
        if isinstance(event, LayerDone):
            tell(f"{event.report.name}: solved in {event.report.seconds:.1f} s")

    with tempfile.TemporaryDirectory() as folder:
        arguments.model, output = f"{folder}/model", f"{folder}/out"
        write_model(Path(arguments.model), shape, arguments.tokenizer, arguments.tokens)
        tell(f"one block of {shape} is written")
        settings = settings_of(arguments.method, arguments, output, arguments.dtype)
        dashq.run(dashq.load_recipe(Path(RECIPE), dashq.load_registry(), settings), listen=listen)
        report = read_report(Path(output))
        seconds = {phase: round(value, 2) for phase, value in report.seconds.items()}
        tell(f"seconds by phase: {seconds}")
        layers = {
            layer.name.rpartition(".")[2]: {
                "seconds": round(layer.seconds, 2),
                "product": round(seconds_of_product(layer.rows, layer.columns), 2),
            }
            for layer in report.layers
        }
        return seconds, layers


def seconds_of_product(rows: int, columns: int) -> float:
    """The least seconds of a product of all weights with all of H, in float32, of three."""
    h, weights = torch.randn(columns, columns), torch.randn(columns, rows)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        h @ weights
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def write_model(folder: Path, shape: Mapping[str, Any], tokenizer: str, positions: int) -> None:
    """A random Llama in bfloat16, of one block where the shape does not say otherwise."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    heads = max(1, shape["hidden_size"] // HEAD)
    config = LlamaConfig(
        **{"num_hidden_layers": 1, **shape},
        vocab_size=len(words),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)


if __name__ == "__main__":
    main()
