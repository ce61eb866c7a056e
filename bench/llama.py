"""A result in a GGUF file in llama.cpp: perplexity beside dashq's own opening of it, and a generated sentence.

Wants an interpreter with llama-cpp-python and dashq. Perplexity is over windows of the test text, spread evenly; dashq
computes in float32, once as it is and once with inputs rounded to 8 bits as llama.cpp's kernels round them.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from bench.smollm2 import spread
from dashq.checkpoint import open_checkpoint, open_network
from dashq.evaluate import perplexity
from dashq.tokens import TextSource, evaluation_windows
from dashq_plugins._gguf_programs import round_to_8_bits

PROMPT = "The capital of France is"


@torch.inference_mode()
def main() -> None:
    """Print one line for each result."""
    parser = argparse.ArgumentParser(prog="python -m bench llama", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--test", default="pydoc")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=6)
    arguments = parser.parse_args()
    for folder in arguments.folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        source = TextSource(name=arguments.test, split="test")
        windows = spread(evaluation_windows(source, tokenizer, arguments.context, None), arguments.windows)
        print(json.dumps({"result": folder.name, **compare(folder, windows)}), flush=True)


def compare(folder: Path, windows: Tensor) -> dict[str, Any]:
    """The figures of one result."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports] - optional

    model: Any = Llama(str(folder / "model.gguf"), n_ctx=windows.shape[1], logits_all=True, verbose=False)
    start = time.perf_counter()
    losses = [_loss(model, window) for window in windows]
    seconds = time.perf_counter() - start
    generated = model(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
    network = open_network(folder, torch.float32)
    ours = perplexity(network, windows)
    for name, packed in open_checkpoint(folder).layers.items():
        block = packed.grid.blocks.columns if packed.grid.blocks else 32
        network.get_submodule(name).register_forward_pre_hook(partial(_round, block))
    return {
        "windows": len(windows),
        "context": windows.shape[1],
        "llama_cpp": float(torch.tensor(losses).mean().exp()),
        "dashq": ours,
        "dashq_with_rounded_inputs": perplexity(network, windows),
        "tokens_per_second": windows.numel() / seconds,
        "prompt": PROMPT,
        "generated": generated,
    }


def _loss(model: Any, window: Tensor) -> float:
    model.reset()
    model.eval(window.tolist())
    logits = torch.tensor(model.scores[: len(window)])
    return float(functional.cross_entropy(logits[:-1], window[1:]))


def _round(block: int, module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (round_to_8_bits(inputs[0], block),)


if __name__ == "__main__":
    main()
