"""A result in a GGUF file in llama.cpp: perplexity beside dashq's own opening of it, and a generated sentence.

Wants an interpreter with llama-cpp-python and dashq. Perplexity is over windows of the test text, spread evenly; dashq
computes in float32, once as it is and once with inputs rounded to 8 bits as llama.cpp's kernels round them.
`differences` are of logits from dashq's, as a share of the largest, for a short prompt and for the first 200 tokens of
the text: llama.cpp with the file, or with its weights in float16 or float32, each with keys and values in both types.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from bench._record import result_line
from bench.smollm2 import spread
from dashq.calibration.tokens import evaluation_windows
from dashq.measuring.evaluate import perplexity
from dashq.results.checkpoint import open_checkpoint, open_network
from dashq.text_source import TextSource
from dashq_plugins.formats.gguf.programs import in_float32, rewrite, round_to_8_bits

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
        print(result_line({"result": folder.name, **compare(folder, windows)}), flush=True)


def compare(folder: Path, windows: Tensor) -> dict[str, Any]:
    """The figures of one result."""
    model = _open(folder / "model.gguf", windows.shape[1])
    start = time.perf_counter()
    losses = [_loss(model, window) for window in windows]
    seconds = time.perf_counter() - start
    generated = model(PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
    network = open_network(folder, torch.float32)
    ours = perplexity(network, windows)
    prompts = [AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"], windows[0, :200].tolist()]
    plain = [network(torch.tensor([ids])).logits[0] for ids in prompts]
    differences = _differences(folder, prompts, plain)
    for name, packed in open_checkpoint(folder).layers.items():
        block = packed.grid.super_blocks.columns if packed.grid.super_blocks else 32
        network.get_submodule(name).register_forward_pre_hook(partial(_round, block))
    rounded = [network(torch.tensor([ids])).logits[0] for ids in prompts]
    differences["dashq, inputs rounded to 8 bits"] = [
        _share(one, other) for one, other in zip(rounded, plain, strict=True)
    ]
    return {
        "windows": len(windows),
        "context": windows.shape[1],
        "llama_cpp": float(torch.tensor(losses).mean().exp()),
        "dashq": ours,
        "dashq_with_rounded_inputs": perplexity(network, windows),
        "tokens_per_second": windows.numel() / seconds,
        "prompt": PROMPT,
        "generated": generated,
        "differences": differences,
    }


def _differences(folder: Path, prompts: list[list[int]], plain: list[Tensor]) -> dict[str, list[float]]:
    found = {}
    with TemporaryDirectory() as temporary:
        path = folder / "model.gguf"
        copies = {"float16": in_float16, "float32": in_float32}
        for weights in ("packed", *copies):
            if weights in copies:
                path = Path(temporary) / f"{weights}.gguf"
                rewrite(folder / "model.gguf", path, copies[weights])
            for cache in ("float16", "float32"):
                model = _open(path, 512, cache)
                logits = [_logits(model, ids) for ids in prompts]
                found[f"{weights}, cache in {cache}"] = [
                    _share(one, two) for one, two in zip(logits, plain, strict=True)
                ]
    return found


def in_float16(tensor: Any) -> Any:
    """The numbers of a tensor, matrices in float16."""
    numbers = in_float32(tensor)
    return numbers.astype("float16") if numbers.ndim > 1 else numbers


def _open(path: Path, context: int, cache: str = "float16") -> Any:
    from llama_cpp import GGML_TYPE_F16, GGML_TYPE_F32, Llama  # pyright: ignore[reportMissingImports] - optional

    kind = {"float16": GGML_TYPE_F16, "float32": GGML_TYPE_F32}[cache]
    return Llama(str(path), n_ctx=context, logits_all=True, verbose=False, type_k=kind, type_v=kind, flash_attn=False)


def _share(theirs: Tensor, ours: Tensor) -> float:
    return float((theirs - ours).abs().max() / ours.abs().max())


def _logits(model: Any, ids: list[int]) -> Tensor:
    model.reset()
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)])


def _loss(model: Any, window: Tensor) -> float:
    logits = _logits(model, window.tolist())
    return float(functional.cross_entropy(logits[:-1], window[1:]))


def _round(block: int, module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (round_to_8_bits(inputs[0], block),)


if __name__ == "__main__":
    main()
