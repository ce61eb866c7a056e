"""Peak memory and seconds of `dashq run` on a random Llama in bfloat16 shards, beside the plan's estimate.

It has 1.17 or 6.88 billion weights, or three blocks of the shape of one with 70 billion, or one block with a quarter of
its width.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from bench._record import result_line
from dashq.results.report import read_report

SMALL = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
WIDE = {
    "vocab_size": 49152,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
QUARTER = {
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# The rest is what LlamaConfig assumes.
SHAPES = {"llama-1b": SMALL, "llama-2-7b": {"vocab_size": 49152}, "llama-70b": WIDE, "llama-70b-quarter": QUARTER}
WRITE_CHECKPOINT = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
shape, tokenizer, folder, device = json.loads(sys.argv[1]), *sys.argv[2:]
with torch.device(device):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
model.save_pretrained(folder, max_shard_size="500MB")
AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
"""
RECIPE = "recipes/smollm2_2bit.yaml"
ESTIMATE = """
import json, sys
from pathlib import Path
from dashq import load_recipe, load_registry
from dashq.estimate import estimate
from dashq.quantizing.opening import open_model, plan_model
recipe = load_recipe(Path(sys.argv[1]), load_registry(), sys.argv[3:])
model = open_model(recipe)
costs = estimate(model, plan_model(recipe, model), recipe)
Path(sys.argv[2]).write_text(json.dumps({"bytes": round(costs.memory), "seconds": round(costs.seconds, 1)}))
"""
# What a process held before it starts another counts towards the other's peak, so this small one is in between.
LAUNCH = """
import os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[2:]).pid, 0)
os.write(int(sys.argv[1]), f"{usage.ru_maxrss} {usage.ru_utime + usage.ru_stime}".encode())
sys.exit(status != 0)
"""


def main() -> None:
    """Write the checkpoint, run on it in a process of its own, and print what that took beyond importing dashq."""
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--tokenizer", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--estimator", default="diagonal")
    parser.add_argument("--solver", default="closed_form")
    parser.add_argument("--propagate", default="original")
    parser.add_argument("--error-correction", type=float, default=0.0)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--tuner", default="null", help="in YAML, as a recipe has it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, output = Path(folder) / "model", Path(folder) / "out"
        shape = json.dumps(SHAPES[arguments.shape])
        _peak([sys.executable, "-c", WRITE_CHECKPOINT, shape, arguments.tokenizer, str(model), arguments.device])
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        baseline = _peak([sys.executable, "-c", "import dashq; dashq.load_registry()"])
        settings = {
            "model": model,
            "output": output,
            "scheme.solver": arguments.solver,
            "scheme.estimator": arguments.estimator,
            "device": arguments.device,
            "calibration.propagate": arguments.propagate,
            "calibration.error_correction": arguments.error_correction,
            "calibration.dataset": "pydoc",
            "calibration.samples": arguments.samples,
            "calibration.sequence_length": arguments.tokens,
            "tuner": arguments.tuner,
            "embeddings": "null",
        }
        changes = [f"{key}={value}" for key, value in settings.items()]
        expected = Path(folder) / "expected.json"
        _peak([sys.executable, "-c", ESTIMATE, RECIPE, str(expected), *changes])
        command = [str(Path(sys.executable).with_name("dashq")), "run", RECIPE, "--quiet"]
        peak = _peak(command + [f"--set={change}" for change in changes])
        report, planned = read_report(output), json.loads(expected.read_text())
    figures = {
        "shape": arguments.shape,
        "solver": arguments.solver,
        "estimator": arguments.estimator,
        "propagate": arguments.propagate,
        **({} if report.tuned is None else {"tuner": report.tuned.tuner}),
        "checkpoint_bytes": size,
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "beyond_baseline_bytes": peak - baseline,
        "a third of the checkpoint and 1 GB": size / 3 + 1e9,
        "expected": planned,
        "seconds": report.seconds,
        **({} if report.device_bytes is None else {"device_bytes": report.device_bytes}),
    }
    print(result_line(figures, arguments.device))


def _peak(command: list[str], log: IO[str] | None = None) -> int:
    """The largest resident set of a process, in bytes; what it prints goes to `log` where there is one."""
    return usage(command, log)[0]


def usage(command: list[str], log: IO[str] | None = None) -> tuple[int, float]:
    """The largest resident set of a process in bytes, and its seconds of the processor, as the system accounts them."""
    reading, writing = os.pipe()
    launch = [sys.executable, "-I", "-S", "-c", LAUNCH, str(writing), *command]
    done = subprocess.run(launch, stdout=log, stderr=log, pass_fds=[writing])
    os.close(writing)
    with os.fdopen(reading) as pipe:
        peak, seconds = pipe.read().split()
    if done.returncode:
        raise SystemExit(f"{command[0]} failed")
    return int(peak) * 1024, float(seconds)


if __name__ == "__main__":
    main()
