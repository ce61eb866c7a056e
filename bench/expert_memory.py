"""Peak memory and time of `dashq run` on random Mixtrals against the number of experts and of blocks."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from bench.memory import _peak
from bench.mixture import FOLDER

WRITE_CHECKPOINT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig
experts, blocks, tokenizer, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
config = MixtralConfig(vocab_size=1024, hidden_size=512, intermediate_size=256, num_hidden_layers=blocks,
    num_attention_heads=8, num_key_value_heads=8, num_local_experts=experts, num_experts_per_tok=2)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
"""


def main() -> None:
    """Print one line of JSON for each model."""
    parser = argparse.ArgumentParser(prog="python -m bench expert_memory", description=__doc__)
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--blocks", type=int, nargs="*", default=[2, 4])
    arguments = parser.parse_args()
    baseline = _peak([sys.executable, "-c", "import dashq; dashq.load_registry()"])
    for experts in arguments.experts:
        for blocks in arguments.blocks:
            print(json.dumps(measure(experts, blocks, baseline)), flush=True)


def measure(experts: int, blocks: int, baseline: int) -> dict[str, object]:
    """The figures of one model."""
    with tempfile.TemporaryDirectory() as folder:
        model, output = Path(folder) / "model", Path(folder) / "out"
        _peak([sys.executable, "-c", WRITE_CHECKPOINT, str(experts), str(blocks), str(FOLDER), str(model)])
        settings = {"model": model, "output": output, "scheme.solver": "rtn", "certificate": 0}
        settings |= {"calibration.dataset": "pydoc", "calibration.samples": 16, "calibration.tokens": 256}
        command = [str(Path(sys.executable).with_name("dashq")), "run", "recipes/mixtral_2bit.yaml", "--quiet"]
        start = time.perf_counter()
        peak = _peak(command + [f"--set={key}={value}" for key, value in settings.items()])
        return {
            "experts": experts,
            "blocks": blocks,
            "block_weights": 3 * experts * 512 * 256 + 4 * 512 * 512,
            "beyond_baseline_bytes": peak - baseline,
            "seconds": round(time.perf_counter() - start, 1),
            "phases": json.loads((output / "report.json").read_text())["seconds"],
        }
