"""CPU seconds to open, plan and read models of more and more tiny blocks, which should grow with their number."""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from bench._record import result_line
from dashq import load_recipe, load_registry
from dashq.quantizing.opening import open_model, plan_model

RECIPE = Path("recipes/smollm2_2bit.yaml")
SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def main() -> None:
    """Print one line of JSON for each number of blocks."""
    parser = argparse.ArgumentParser(prog="python -m bench growth", description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="*", default=[100, 200, 400, 800])
    parser.add_argument("--tokenizer", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="Its folder.")
    parser.add_argument("--note", default="", help="Words that tell this line from others, as `before`.")
    arguments = parser.parse_args()
    for count in arguments.blocks:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder) / "model", count, arguments.tokenizer)
            figures = {"blocks": count, "note": arguments.note} | seconds(Path(folder))
        print(result_line(figures), flush=True)


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
