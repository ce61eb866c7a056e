"""Peak resident memory of `dashq run` on a random Llama of 1.17 billion parameters in bfloat16 shards."""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=49152,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)


def main() -> None:
    """Write the checkpoint, run on it in a process of its own, and print what both processes took at most."""
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--tokenizer", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--solver", default="irls")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, output = Path(folder) / "model", Path(folder) / "out"
        network = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)  # random, as a new model is
        network.save_pretrained(model, max_shard_size="500MB")
        del network
        AutoTokenizer.from_pretrained(arguments.tokenizer).save_pretrained(model)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        baseline = _peak([sys.executable, "-c", "import dashq; dashq.load_registry()"])
        settings = {
            "model": model,
            "output": output,
            "scheme.solver": arguments.solver,
            "calibration.samples": arguments.samples,
            "calibration.tokens": arguments.tokens,
        }
        command = [str(Path(sys.executable).with_name("dashq")), "run", "recipes/smollm2_2bit.yaml", "--quiet"]
        peak = _peak(command + [f"--set={key}={value}" for key, value in settings.items()])
        seconds = json.loads((output / "report.json").read_text())["seconds"]
    figures = {
        "checkpoint_bytes": size,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "beyond_baseline_bytes": peak - baseline,
        "allowed_bytes": size / 3 + 1e9,
        "seconds": seconds,
    }
    print(json.dumps(figures, indent=1))


def _peak(command: list[str]) -> int:
    """The largest resident set of a child process, in bytes. Children must be run in order of size."""
    subprocess.run(command, check=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


if __name__ == "__main__":
    main()
