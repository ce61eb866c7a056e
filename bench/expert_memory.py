"""Peak memory and time of `dashq run` on random Mixtrals, by experts, blocks and text, beside the plan's estimate."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from bench._record import result_line
from bench.memory import ESTIMATE, _peak
from bench.mixture import FOLDER
from dashq.results.report import read_report

WRITE_CHECKPOINT = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig
experts, blocks, tokenizer, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
config = MixtralConfig(vocab_size=1024, hidden_size=512, intermediate_size=256, num_hidden_layers=blocks,
    num_attention_heads=8, num_key_value_heads=8, num_local_experts=experts, num_experts_per_tok=2)
AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
"""
RECIPE = "recipes/mixtral_2bit.yaml"


def main() -> None:
    """Print one line of JSON for each model."""
    parser = argparse.ArgumentParser(prog="python -m bench expert_memory", description=__doc__)
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--blocks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--samples", type=int, nargs="*", default=[16])
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    baseline = _peak([sys.executable, "-c", "import dashq; dashq.load_registry()"])
    for experts in arguments.experts:
        for blocks in arguments.blocks:
            for samples in arguments.samples:
                print(result_line(measure(experts, blocks, samples, arguments.tokens, baseline)), flush=True)


def measure(experts: int, blocks: int, samples: int, tokens: int, baseline: int) -> dict[str, object]:
    """The figures of one model."""
    with tempfile.TemporaryDirectory() as folder:
        model, output, expected = (Path(folder) / name for name in ("model", "out", "expected.json"))
        _peak([sys.executable, "-c", WRITE_CHECKPOINT, str(experts), str(blocks), str(FOLDER), str(model)])
        settings = {"model": model, "output": output, "scheme.solver": "rtn", "certificate_groups": 0}
        settings |= {
            "calibration.dataset": "pydoc",
            "calibration.samples": samples,
            "calibration.sequence_length": tokens,
        }
        changes = [f"{key}={value}" for key, value in settings.items()]
        _peak([sys.executable, "-c", ESTIMATE, RECIPE, str(expected), *changes])
        command = [str(Path(sys.executable).with_name("dashq")), "run", RECIPE, "--quiet"]
        start = time.perf_counter()
        peak = _peak(command + [f"--set={change}" for change in changes])
        return {
            "experts": experts,
            "blocks": blocks,
            "samples": samples,
            "tokens": tokens,
            "block_weights": 3 * experts * 512 * 256 + 4 * 512 * 512,
            "state_bytes": samples * tokens * 512 * 2,
            "beyond_baseline_bytes": peak - baseline,
            "seconds": round(time.perf_counter() - start, 1),
            "expected": json.loads(expected.read_text()),
            "phases": read_report(output).seconds,
        }
